"""Bottleneck adapters stand where the papers put them and start as the exact identity.

python -m pytest tests/techniques/test_adapters.py
"""

import copy
import math

import pytest
import torch
from small_models import (
    HIDDEN,
    LAYERS,
    TECHNIQUES,
    close,
    logits,
    modified,
    perturb,
    small,
    token_ids,
)
from torch.nn import functional as F

import modify_llm
from modify_llm import (
    BottleneckAdapter,
    apply_adapters,
    load_trained,
    parameter_counts,
    save_trained,
)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bottleneck(adapter, h, activation):
    down, up = adapter.down_proj, adapter.up_proj
    return activation(h @ down.weight.T + down.bias) @ up.weight.T + up.bias


def houlsby(adapter, x, residual):
    """Houlsby et al., 2019, section 2.1 and figure 2: x is what a sub-layer ends with."""
    return residual + x + bottleneck(adapter, x, gelu)


def pfeiffer(adapter, x, residual):
    """The adapters library's arithmetic for GPT-2, original_ln_before and residual_before_ln set
    (SeqBnConfig): pre_forward, the adapter, post_forward, all without a LayerNorm."""
    hidden_states, residual_input = x + residual, x
    output = bottleneck(adapter, hidden_states, torch.relu) + residual_input
    return output + residual


def forward_by_hand(model, ids, dropout):
    """GPT-2's logits written out, with the adapters that each block holds."""
    body, (rows, length) = model.transformer, ids.shape

    def normed(norm, h):
        return F.layer_norm(h, (HIDDEN,), norm.weight, norm.bias)

    def dense(layer, h):
        return h @ layer.weight + layer.bias

    h = body.wte.weight[ids] + body.wpe.weight[:length]
    for block in body.h:
        adapters = [module for module in block.modules() if isinstance(module, BottleneckAdapter)]
        x = dense(block.attn.c_attn, normed(block.ln_1, h))
        q, k, v = (part.view(rows, length, 4, -1).transpose(1, 2) for part in x.chunk(3, dim=-1))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = dense(block.attn.c_proj, x.transpose(1, 2).reshape(rows, length, HIDDEN))
        x = F.dropout(x, dropout)
        h = houlsby(adapters[0], x, h) if len(adapters) == 2 else h + x
        x = dense(block.mlp.c_proj, gelu(dense(block.mlp.c_fc, normed(block.ln_2, h))))
        h = (houlsby if len(adapters) == 2 else pfeiffer)(adapters[-1], F.dropout(x, dropout), h)
    return normed(body.ln_f, h) @ body.wte.weight.T


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("placement", "per_block"), [("pfeiffer", 1), ("houlsby", 2)])
def test_adapters_stand_where_the_papers_put_them(placement, per_block, dropout):
    model = perturb(apply_adapters(small(resid_pdrop=dropout), 8, placement=placement), 0.2).train()
    assert (
        sum(isinstance(module, BottleneckAdapter) for module in model.modules())
        == per_block * LAYERS
    )
    torch.manual_seed(4)
    expected = forward_by_hand(model, token_ids(), dropout)
    torch.manual_seed(4)
    assert close(model(input_ids=token_ids()).logits, expected)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_an_adapter_s_activation_is_the_one_that_is_named(name):
    model = perturb(apply_adapters(small(), 8, activation=name), 0.2)
    functions = {"relu": torch.relu, "gelu": gelu, "silu": lambda x: x * torch.sigmoid(x)}
    adapter, h = model.transformer.h[1].adapter, torch.randn(3, HIDDEN)
    assert close(adapter(h), h + bottleneck(adapter, h, functions[name]))


def test_an_adapter_of_an_earlier_version_is_refused_by_what_it_lacks(base, tmp_path):
    save_trained(modified(base, **TECHNIQUES["pfeiffer"]), tmp_path)
    settings = modify_llm.read_json(tmp_path / "modification.json")
    del settings["adapter_activation"]  # they had none, and "pfeiffer" was another architecture
    modify_llm.write_json(tmp_path / "modification.json", settings)
    with pytest.raises(ValueError, match=r"json: adapters of an earlier version"):
        load_trained(tmp_path)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_adapters_start_as_the_exact_identity_and_are_all_that_trains(placement):
    base = small()
    model = apply_adapters(copy.deepcopy(base), 8, placement=placement)
    assert torch.equal(logits(model), logits(base))
    one = 8 * HIDDEN + 8 + HIDDEN * 8 + HIDDEN
    adapters = LAYERS * (2 if placement == "houlsby" else 1)
    assert parameter_counts(model) == (base.num_parameters() + adapters * one, adapters * one)
    assert set(base.state_dict()) <= set(model.state_dict())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "up_proj.weight" in n)
