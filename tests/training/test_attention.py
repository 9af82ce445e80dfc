"""The causal attention is its plain formula, also behind a prefix or a cache.

python -m pytest tests/training/test_attention.py
"""

import math

import pytest
import torch
from runs import CPU, TECHNIQUES, technique_model

import train_llm
from train_llm import SummedLoss, loss_inputs


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("queries", [1, 32, 300])  # of a cache's next token, and whole rows
def test_causal_attention_is_its_plain_formula(queries, prefix):
    torch.manual_seed(0)
    keys, module = prefix + queries, torch.nn.Module()
    states = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (queries, keys, keys)]
    upstream, results = torch.randn(2, queries, 3, 8), []
    output, _ = train_llm.causal_attention(module, *states, None, scaling=0.3)
    results.append([output, *torch.autograd.grad(output, states, upstream)])
    query, key, value = states
    scores = 0.3 * query @ key.transpose(-1, -2)
    later = torch.ones_like(scores, dtype=torch.bool).triu(keys - queries + 1)
    output = (scores.masked_fill(later, -math.inf).softmax(-1) @ value).transpose(1, 2)
    results.append([output, *torch.autograd.grad(output, states, upstream)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_without_a_mask_the_loss_is_the_same_and_the_attention_is_put_back(technique, batch):
    model = technique_model(technique)
    summed_loss, parts = SummedLoss(model), loss_inputs(batch, CPU)
    plain = sum(summed_loss(**part) for part in parts)
    before = model.config._attn_implementation
    with train_llm.attention_without_mask(model):
        assert model.config._attn_implementation == "causal"
        ours = sum(summed_loss(**part) for part in parts)
    assert model.config._attn_implementation == before
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
