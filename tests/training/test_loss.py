"""The loss and its gradients are those of transformers, however a batch is taken in parts.

python -m pytest tests/training/test_loss.py
"""

import math
import platform
import random
import subprocess
import sys

import pytest
import torch
from runs import CPU, ROOT, TECHNIQUES, technique_model
from tiny import tiny_gpt2
from torch.nn import functional as F

import data_pipeline
import train_llm
from train_llm import ChunkedCrossEntropy, SummedLoss, loss_inputs


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_loss_and_gradients_are_those_of_transformers_own_loss(technique, batch):
    model = technique_model(technique)
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    theirs = model(**batch).loss
    theirs_grad = torch.autograd.grad(theirs, list(trained.values()))
    parts, summed_loss = loss_inputs(batch, CPU), SummedLoss(model)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    assert sum(len(part["targets"]) for part in parts) == tokens
    ours = sum(summed_loss(**part) for part in parts) / tokens
    ours_grad = torch.autograd.grad(ours, list(trained.values()))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, mine, reference in zip(trained, ours_grad, theirs_grad, strict=True):
        assert reference.abs().max() > 0, name
        torch.testing.assert_close(
            mine, reference, rtol=1e-4, atol=1e-6 * float(reference.abs().max()) + 1e-8
        )


@pytest.mark.parametrize("at_once", [1, 40, 90])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_batch_that_is_taken_in_parts_has_the_same_loss_and_gradients(technique, at_once, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_llm, "PADDING", math.inf)
        whole = loss_inputs(batch, CPU)
    parts = loss_inputs(batch, CPU, at_once)
    assert len(parts) > len(whole) == 1
    assert sum(len(part["targets"]) for part in parts) == len(whole[0]["targets"])
    model = technique_model(technique)
    trained, summed_loss = [p for p in model.parameters() if p.requires_grad], SummedLoss(model)
    one, several = (sum(summed_loss(**inputs) for inputs in found) for found in (whole, parts))
    assert several.item() == pytest.approx(one.item(), rel=1e-5)
    grads = (torch.autograd.grad(loss, trained) for loss in (several, one))
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(
            mine, reference, rtol=1e-3, atol=1e-5 * float(reference.abs().max())
        )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap")
def test_a_block_of_20_mb_goes_back_to_the_system_when_it_is_freed():
    """Ten of them, with blocks of 8 MB between them; by themselves they stay, after larger ones."""
    code = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_llm
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
train_llm.return_freed_memory()
for _ in range(3):
    torch.ones(7_900_000)
before, blocks = resident(), []
for _ in range(10):
    blocks += [torch.ones(5_000_000), torch.ones(2_000_000)]
del blocks[::2]
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150


def test_rows_of_any_length_are_in_exactly_one_part_with_little_padding():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, draw.choice((5, 200, 3000))) for _ in range(draw.randint(1, 9))]
        rows = [
            {"input_ids": torch.full((n,), i), "labels": torch.arange(n)}
            for i, n in enumerate(lengths, 1)
        ]
        parts = loss_inputs(data_pipeline.PadBatch(99, None)(rows), CPU, 500)
        ids = [part["input_ids"] for part in parts]
        tokens = [t for part in ids for t in part.flatten().tolist() if t != 99]
        assert sorted(tokens) == [i for i, n in enumerate(lengths, 1) for _ in range(n)]
        assert sum(len(part["targets"]) for part in parts) == sum(lengths) - len(lengths)
        for part in ids:
            assert part.shape[1] % 8 == 0
            assert len(part) == 1 or part.numel() <= 500 + 7 * len(part)
            real = int((part != 99).sum())
            longest = int((part != 99).sum(1).max())
            assert len(part) * longest <= max(256, 1.15 * real)


def test_loss_is_the_hand_computed_sum_over_labelled_tokens():
    model = tiny_gpt2(vocab_size=13, n_embd=8, n_head=2, n_positions=8)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 12]])
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 6, 7, -100]])
    with torch.no_grad():
        logits = model(ids).logits.double().tolist()
    expected = 0.0
    for row, position, token in ((0, 1, 3), (0, 2, 4), (1, 0, 6), (1, 1, 7)):
        scores = logits[row][position]
        expected += math.log(sum(math.exp(score) for score in scores)) - scores[token]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": labels,
    }
    assert sum(
        SummedLoss(model)(**part) for part in loss_inputs(batch, CPU)
    ).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "trained", [(True, False), (False, True), (True, True)], ids=("hidden", "weight", "both")
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows_", [1, 128, 5000], ids="{} rows".format)
def test_chunked_cross_entropy_is_cross_entropy_in_value_and_gradient(rows_, trained, smoothing):
    """With label smoothing the gradient alone is the smoothed objective's, the value stays plain."""
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(rows_, 16),
        torch.randn(50, 16),
        torch.randint(50, (rows_,)),
    )
    hidden.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
    wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    ours = ChunkedCrossEntropy.apply(hidden, weight, targets, True, smoothing)
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    theirs = F.cross_entropy(
        hidden @ weight.t(), targets, reduction="sum", label_smoothing=smoothing
    )
    log_p = F.log_softmax(hidden @ weight.t(), -1)  # microsoft/LoRA's model.py, written out
    nll, uniform = -log_p.gather(1, targets[:, None])[:, 0], -log_p.mean(-1)
    hus = ((1 - smoothing) * nll + smoothing * uniform).sum()
    torch.testing.assert_close(hus, theirs, rtol=1e-5, atol=0)
    for mine, reference in zip(
        torch.autograd.grad(0.37 * ours, wanted),
        torch.autograd.grad(0.37 * theirs, wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_cross_entropy_of_bf16_states_is_summed_in_fp32():
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(500, 16).bfloat16(),
        torch.randn(50, 16).bfloat16(),
        torch.arange(500) % 50,
    )
    loss = ChunkedCrossEntropy.apply(hidden, weight, targets, False)
    reference = F.cross_entropy(hidden.float() @ weight.float().t(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        reference.item(), rel=1e-3
    )  # bf16 alone would be off by up to 4e-3


@pytest.mark.parametrize("technique", ["lora", "full"])
def test_a_batch_without_labels_adds_zero_to_loss_and_gradients(technique, batch):
    model = technique_model(technique)
    blank = batch | {"labels": torch.full_like(batch["labels"], -100)}
    loss = SummedLoss(model)(**loss_inputs(blank, CPU)[0])
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
