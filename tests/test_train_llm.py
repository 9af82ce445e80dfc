"""Claim: one training loop serves every technique, its loss is exact however a step is cut, a run that was stopped,
killed or damaged goes on as if nothing had been, and whatever is wrong ends in one line and the right exit status.

    python -m pytest tests/test_train_llm.py            # about three minutes on one core; the demo takes the most
    python -m pytest tests/test_train_llm.py -k "not demo and not torchrun"
"""

import argparse
import copy
import errno
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from argparse import Namespace
from contextlib import closing, contextmanager, redirect_stdout
from datetime import datetime
from pathlib import Path

import filelock
import pytest
import torch
from conftest import tiny_gpt2
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch.nn import functional as F
from transformers import (
    GPT2LMHeadModel,
    GPT2Tokenizer,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

import data_pipeline
import modify_llm
import train_llm
from train_llm import (
    ChunkedCrossEntropy,
    Runtime,
    SummedLoss,
    evaluate,
    learning_rate_at,
    loss_inputs,
)

ROOT = Path(train_llm.__file__).parent
RESUME = ("--resume_from", "auto")
EOS = 256  # of the byte tokenizer: 256 bytes and the end of text
FORMAT = "{q}||{a}"
CPU = Runtime(torch.device("cpu"), torch.float32)
TECHNIQUES = {
    "lora": {},
    "thirds": {"lora_target_modules": "c_attn.q,c_attn.v", "trainable_modules": "ln_f"},
    "adapter": {"modification_type": "adapter", "adapter_size": 8, "adapter_placement": "houlsby"},
    "prefix": {"modification_type": "prefix", "prefix_length": 5},
    "key_value": {
        "modification_type": "prefix", "prefix_type": "key_value", "prefix_length": 5, "prefix_projection_size": 16
    },
    "selective": {"modification_type": "selective", "freeze_layers": "0"},
    "full": {"modification_type": "full"},
}  # fmt: skip


# ---- small data, small models, short runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = GPT2Tokenizer(
        vocab={c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, merges=[]
    )
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return tokenizer


def small_gpt2(seed=0, **overrides):
    settings = {"vocab_size": 257, "eos_token_id": EOS, "bos_token_id": EOS} | overrides
    with torch.no_grad():
        return tiny_gpt2(seed, **settings)


@pytest.fixture(scope="module")
def small_base(tmp_path_factory, bytes_tokenizer):
    """Two layers, hidden size 32, and a token a byte, as a local directory."""
    directory = tmp_path_factory.mktemp("small_base")
    small_gpt2().save_pretrained(directory)
    bytes_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """26 rows; 5 are held out and 21 are left, so that the last step of each epoch has a single row."""
    draw = random.Random(0)
    text = [
        {"q": "Q" * draw.randint(1, 20), "a": "".join(draw.choices("abc de", k=k * 2 + 1))}
        for k in range(26)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(text))
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Drawing would take longer than training; one run, through the script itself, draws its curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn"))
        yield


@pytest.fixture(scope="module")
def flags(small_base, rows):
    """Builds the command line of a short run: 6 steps of 2 x 2 rows unless told otherwise; None drops a flag."""

    def build(output_dir, **changes):
        settings = {
            "dataset_path": rows, "text_format": FORMAT, "max_length": 96, "eval_fraction": 0.2, "batch_size": 2,
            "gradient_accumulation_steps": 2, "model_name_or_path": small_base, "output_dir": output_dir,
            "max_steps": 6, "learning_rate": 0.01, "log_interval": 1, "num_samples": 0, "precision": "fp32",
            "device": "cpu",
        } | changes  # fmt: skip
        pairs = [
            (k, v)
            for k, vs in settings.items()
            for v in (vs if isinstance(vs, list) else [vs])
            if v is not None
        ]
        return [f"--{key}={value}" for key, value in pairs]

    return build


def run(argv):
    """The exit status of `train_llm.py argv`, in this process."""
    try:
        return train_llm.main(argv)
    except SystemExit as leaving:
        return leaving.code


def refused(argv, capsys, status=2):
    """The one line on stderr of a run that must end with this status."""
    capsys.readouterr()
    code = run(argv)
    error = capsys.readouterr().err
    assert code == status, error
    assert re.fullmatch(r"train_llm\.py: error: \S.*\n", error), error
    return error


def script(argv, **environment):
    """`python train_llm.py argv` as a user starts it."""
    command = [sys.executable, str(ROOT / "train_llm.py"), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def metrics(output_dir):
    """The rows of metrics.jsonl, without the one value that depends on the clock."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines
    ]


def training_losses(output_dir):
    return [row["loss"] for row in metrics(output_dir) if "loss" in row]


def held_out_losses(output_dir):
    return {row["step"]: row["eval_loss"] for row in metrics(output_dir) if "eval_loss" in row}


def checkpoints(output_dir):
    return sorted((output_dir / "checkpoints").iterdir())


def saved(directory, suffix=".safetensors"):
    """{file and tensor: (type, shape, bytes)} of all tensors that lie in a directory."""
    return {
        f"{file.name}: {name}": (str(tensor.dtype), tensor.shape, tensor.numpy().tobytes())
        for file in sorted(directory.glob("*" + suffix))
        for name, tensor in load_file(file).items()
    }


def outcome(output_dir):
    """All that a run leaves behind that must not depend on how often it was stopped."""
    last = checkpoints(output_dir)[-1]
    places = {"final": output_dir / "final", "best": output_dir / "best", "last checkpoint": last}
    return {"step": last.name, "metrics": metrics(output_dir)} | {
        name: saved(path) for name, path in places.items()
    }


def snapshot(directory):
    """{file: (time of its last change, sha256)} of everything below a directory but the lock."""
    return {
        str(file.relative_to(directory)): (
            file.stat().st_mtime_ns,
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def hidden_leftovers(output_dir):
    return {path.name for path in output_dir.iterdir() if path.name.startswith(".")} - {".lock"}


@contextmanager
def in_micro_step(number, act, training=True):
    """Calls `act` in the forward pass of the number-th micro-batch (from 1) of training, or else of evaluation."""
    counter, forward = itertools.count(1), SummedLoss.forward

    def counted(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        if self.training == training and next(counter) == number:
            changed = act(loss)
            return loss if changed is None else changed
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummedLoss, "forward", counted)
        yield


@contextmanager
def stopped_in(number, by=signal.SIGTERM, training=True):
    """Sends this process a signal in the middle of a micro-batch; one that nobody handles fails the test."""
    previous = signal.signal(by, lambda *_: pytest.fail("the run had no handler for the signal"))
    try:
        with in_micro_step(number, lambda _: os.kill(os.getpid(), by), training):
            yield
    finally:
        signal.signal(by, previous)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(rows, bytes_tokenizer):
    """Eight rows of 2 to 70 tokens."""
    kinds = {
        "text_format": FORMAT,
        "max_length": 96,
        "num_workers": 0,
        "tokenizer": bytes_tokenizer,
    }
    return next(iter(data_pipeline.final_dataset_loader(rows, padding="longest", **kinds)))


def technique_model(technique, base=None):
    """A small model under the technique, with noise on what trains, so that no gradient is trivially zero."""
    settings = modify_llm.with_defaults(None, **TECHNIQUES[technique])
    model = modify_llm.modify(base or small_gpt2(), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(done.stdout) < 150, done.stderr


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("queries", [1, 32, 300])  # less than a block, and three blocks
def test_causal_attention_is_its_plain_formula_and_pytorchs_own(queries, prefix):
    torch.manual_seed(0)
    keys, module = prefix + queries, torch.nn.Module()
    states = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (queries, keys, keys)]
    upstream, results = torch.randn(2, queries, 3, 8), []
    for dropout in (0.0, 1e-12):  # any dropout at all takes PyTorch's way, as a GPU does
        output, _ = train_llm.causal_attention(module, *states, None, scaling=0.3, dropout=dropout)
        results.append([output, *torch.autograd.grad(output, states, upstream)])
    query, key, value = states
    scores = 0.3 * query @ key.transpose(-1, -2)
    later = torch.ones_like(scores, dtype=torch.bool).triu(keys - queries + 1)
    output = (scores.masked_fill(later, -math.inf).softmax(-1) @ value).transpose(1, 2)
    results.append([output, *torch.autograd.grad(output, states, upstream)])
    for ours, sdpa, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sdpa, plain, rtol=1e-4, atol=1e-5)


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


# ---- a step is the same however it is cut ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_three_ways(tmp_path_factory, base_dir):
    """The same 8 rows a step as 8 x 1, 2 x 4 and 1 x 8; the last step of each epoch has 5 rows."""
    directory, draw = tmp_path_factory.mktemp("cuts"), random.Random(1)
    lengths = [1, 60, 2, 45, 3, 30, 1, 55, 5, 20] * 3
    text = [
        {
            "instruction": f"Say {i}.",
            "input": "x " * (i % 3),
            "output": " ".join(draw.choices(["red", "blue", "I"], k=n)),
        }
        for i, n in enumerate(lengths[:26])
    ]
    (directory / "rows.json").write_text(json.dumps(text))
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        argv = [
            "--dataset_path",
            directory / "rows.json",
            "--model_name_or_path",
            base_dir,
            "--text_format",
            "alpaca",
        ]
        argv += [
            "--output_dir",
            directory / f"{batch_size}x{accumulation}",
            "--max_length",
            128,
            "--epochs",
            2,
        ]
        argv += [
            "--batch_size",
            batch_size,
            "--gradient_accumulation_steps",
            accumulation,
            "--eval_fraction",
            0.2,
        ]
        argv += [
            "--precision",
            "fp32",
            "--log_interval",
            1,
            "--num_samples",
            0,
            "--learning_rate",
            "3e-3",
        ]
        assert run([str(word) for word in argv]) == 0
    return directory


@pytest.mark.parametrize("cut", ["2x4", "1x8"])
def test_accumulated_micro_batches_equal_the_large_batch(cut_three_ways, cut):
    whole, parts = cut_three_ways / "8x1", cut_three_ways / cut
    assert len(training_losses(whole)) == 2 * 3
    assert training_losses(parts) == pytest.approx(training_losses(whole), rel=1e-6)
    assert list(held_out_losses(parts).values()) == pytest.approx(
        list(held_out_losses(whole).values()), rel=1e-6
    )
    norms = [
        [row["grad_norm"] for row in metrics(run_) if "grad_norm" in row] for run_ in (whole, parts)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    expected = load_file(whole / "final" / "adapter_model.safetensors")
    for name, tensor in load_file(parts / "final" / "adapter_model.safetensors").items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: n + text
        )


def first_gradients(output_dir):
    """The gradients of a run of a single step, as AdamW saw them: its first moment is a tenth of them."""
    tensors = load_file(checkpoints(output_dir)[-1] / "optimizer.safetensors")
    return {
        k.removesuffix(".exp_avg"): 10 * v for k, v in tensors.items() if k.endswith(".exp_avg")
    }


def plain_loss(model, dataset, backward=False):
    """(transformers' own mean loss over the labelled tokens, their number), a row at a time, and its gradients."""
    total, tokens = 0.0, int(dataset.label_counts.sum())
    with torch.set_grad_enabled(backward):
        for i in range(len(dataset)):
            row = {name: tensor[None] for name, tensor in dataset[i].items()}
            share = model(**row).loss * int((row["labels"] != -100).sum()) / tokens
            total += share.item()
            if backward:
                share.backward()
    return total, tokens


def test_two_steps_are_those_of_pytorchs_adamw_on_its_own_smoothed_cross_entropy(
    flags, tmp_path, rows, bytes_tokenizer
):
    """And what is logged is the loss without smoothing."""
    settings = {"label_smoothing": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_epsilon": 1e-3}
    settings |= {"modification_type": "full", "scheduler": "constant", "max_grad_norm": 0}
    settings |= {"max_samples": 8, "batch_size": 8, "gradient_accumulation_steps": 1}
    assert run(flags(tmp_path, **settings, max_steps=2, weight_decay=0)) == 0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    train_rows, model, plain = dataset.split(0.2, 42)[0], small_gpt2(), []
    adamw = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(0.8, 0.7), eps=1e-3, weight_decay=0
    )
    for _ in range(2):
        logits, labels = [], []
        for row in (train_rows[i] for i in range(8)):
            logits.append(model(row["input_ids"][None]).logits[0, :-1])
            labels.append(row["labels"][1:])
        logits, labels = torch.cat(logits), torch.cat(labels)
        plain.append(F.cross_entropy(logits, labels).item())
        F.cross_entropy(logits, labels, label_smoothing=0.2).backward()
        adamw.step()
        adamw.zero_grad()
    assert training_losses(tmp_path) == pytest.approx(plain, rel=1e-5)
    weights = load_file(checkpoints(tmp_path)[-1] / "trainable.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-4, atol=2e-5)


def plain_right(model, dataset):
    """The number of labelled tokens that are the likeliest by transformers' own logits."""
    right = 0
    with torch.no_grad():
        for row in dataset:
            likeliest, labels = model(row["input_ids"][None]).logits[0].argmax(-1), row["labels"]
            right += int((likeliest[:-1] == labels[1:]).sum())
    return right


def total_norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def test_a_step_follows_the_mean_loss_over_the_tokens_of_the_whole_window(
    flags, tmp_path, rows, bytes_tokenizer
):
    one_step = {"max_steps": 1, "max_grad_norm": 0, "max_samples": 8, "modification_type": "full"}
    assert run(flags(tmp_path, **one_step, gradient_accumulation_steps=4)) == 0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    train_rows, model = dataset.split(0.2, 42)[0], small_gpt2()
    plain_loss(model, train_rows.select(torch.arange(len(train_rows)).numpy() < 8), backward=True)
    reference = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = first_gradients(tmp_path)
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
    assert metrics(tmp_path)[1]["grad_norm"] == pytest.approx(total_norm(reference), rel=1e-5)


@pytest.mark.parametrize("limit", [0.05, 1000.0])
def test_gradients_are_clipped_once_a_step_by_their_norm_over_all_parameters(
    flags, tmp_path, limit
):
    assert (
        run(flags(tmp_path, max_steps=1, max_grad_norm=limit, gradient_accumulation_steps=4)) == 0
    )
    norm = metrics(tmp_path)[1]["grad_norm"]
    assert 0.05 < norm < 1000
    assert total_norm(first_gradients(tmp_path)) == pytest.approx(min(limit, norm), rel=1e-4)


def test_weight_decay_spares_parameters_with_one_dimension(flags, tmp_path):
    """AdamW decays the weight itself by learning rate x decay, besides the same step."""
    for decay in (0.0, 0.5):
        argv = flags(
            tmp_path / str(decay), max_steps=1, weight_decay=decay, modification_type="full"
        )
        assert run([*argv, "--scheduler=constant"]) == 0
    start = dict(small_gpt2().named_parameters())
    plain, decayed = (
        load_file(tmp_path / d / "final" / "model.safetensors") for d in ("0.0", "0.5")
    )
    assert plain.keys() == decayed.keys()
    for name, tensor in plain.items():
        share = 0.01 * 0.5 if tensor.ndim > 1 else 0.0
        torch.testing.assert_close(
            decayed[name], tensor - share * start[name], rtol=0, atol=2e-8 if share else 0
        )


@pytest.mark.parametrize("technique", ["prefix", "key_value", "projected", "lora"])
def test_weight_decay_spares_prefixes(technique, flags, tmp_path):
    more = {"modification_type": "prefix", "prefix_length": 4, "trainable_modules": ["wpe"]}
    more |= {
        "prefix": {}, "key_value": {"prefix_type": "key_value"},
        "projected": {"prefix_type": "key_value", "prefix_projection_size": 8},
        "lora": {"modification_type": "lora", "prefix_length": None},
    }[technique]  # fmt: skip
    args = train_llm.resolve({k: v for k, v in more.items() if v} | {"dataset_path": "-"})
    optimizer = train_llm.make_optimizer(modify_llm.modify(small_gpt2(), args), args)
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    model = modify_llm.modify(small_gpt2(), args)
    assert len(decayed) == (
        1
        if technique != "lora"
        else sum(p.requires_grad and p.ndim > 1 for p in model.parameters())
    )


def test_lora_plus_steps_as_peft_s_optimizer_does():
    from peft.optimizers import create_loraplus_optimizer

    args = train_llm.resolve(
        {"dataset_path": "-", "lora_plus_ratio": 16.0, "learning_rate": 1e-3, "weight_decay": 0.1}
    )
    model = modify_llm.modify(small_gpt2(), args)
    twin = copy.deepcopy(model)
    optimizers = [
        train_llm.make_optimizer(model, args),
        create_loraplus_optimizer(
            twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
        ),
    ]
    for group in optimizers[0].param_groups:  # as train_step does
        group["lr"] = 1e-3 * group["lr_ratio"]
    ids = torch.arange(24).view(2, 12)
    for _ in range(20):
        for trained, optimizer in zip((model, twin), optimizers, strict=True):
            trained(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(twin.named_parameters())
    for name, parameter in modify_llm.trainable_state(model).items():
        torch.testing.assert_close(
            parameter, expected[name].detach(), rtol=0, atol=1e-4
        )  # of steps of 1e-3 and 16e-3


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_trains_a_frozen_base_to_the_same_weights(flags, tmp_path):
    assert run(flags(tmp_path / "without")) == 0
    assert run(flags(tmp_path / "with", gradient_checkpointing="true")) == 0
    assert training_losses(tmp_path / "with") == pytest.approx(
        training_losses(tmp_path / "without"), rel=1e-6
    )


def test_logging_evaluating_sampling_and_workers_never_change_the_weights(flags, tmp_path):
    dropouts = {
        "dropout": 0.1,
        "lora_dropout": 0.1,
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
    }
    assert run(flags(tmp_path / "quiet", **dropouts, log_interval=100, eval_interval=100)) == 0
    busy = {
        "num_samples": 2,
        "temperature": 0.9,
        "max_new_tokens": 4,
        "eval_interval": 2,
        "save_interval": 1,
    }
    assert run(flags(tmp_path / "busy", **(dropouts | busy), num_workers=1)) == 0
    assert saved(tmp_path / "busy" / "final") == saved(tmp_path / "quiet" / "final")


@pytest.mark.skipif(
    not train_llm.bf16_in_hardware(torch.device("cpu")), reason="no bf16 in this processor"
)
def test_bf16_follows_fp32(flags, tmp_path):
    for precision in ("fp32", "bf16"):
        assert run(flags(tmp_path / precision, precision=precision, modification_type="full")) == 0
    assert training_losses(tmp_path / "bf16") == pytest.approx(
        training_losses(tmp_path / "fp32"), abs=0.05
    )
    weights = load_file(checkpoints(tmp_path / "bf16")[-1] / "trainable.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "warmup", "min_lr", "total", "expected"),
    [
        ("warmup_cosine", 4, 0.0, 15, {1: 0.25, 2: 0.5, 4: 1.0, 8: 0.75, 10: 0.5, 12: 0.25}),
        ("warmup_cosine", 4, 0.2, 15, {1: 0.25, 4: 1.0, 8: 0.8, 12: 0.4}),
        ("linear", 4, 0.0, 15, {1: 0.25, 4: 1.0, 8: 2 / 3, 12: 1 / 3, 15: 1 / 12}),
        ("linear", 0, 0.5, 10, {1: 1.0, 6: 0.75, 10: 0.55}),
        ("cosine", 4, 0.0, 12, {1: 1.0, 7: 0.5}),
        ("constant", 0, 0.1, 13, {1: 1.0, 7: 1.0, 13: 1.0}),
        ("constant", 4, 0.1, 13, {1: 0.25, 3: 0.75, 4: 1.0, 13: 1.0}),
        ("warmup_cosine", 10, 0.0, 5, {1: 0.1, 5: 0.5}),
        ("warmup_cosine", 1, 0.0, 2, {1: 1.0, 2: 0.5}),
        ("warmup_cosine", 0, 0.0, 1, {1: 1.0}),
    ],
)
def test_the_learning_rate_at_points_computed_by_hand(scheduler, warmup, min_lr, total, expected):
    args = Namespace(scheduler=scheduler, learning_rate=3.0, warmup_steps=warmup, min_lr=3 * min_lr)
    rates = {step: learning_rate_at(step, total, args) for step in expected}
    assert rates == pytest.approx({step: 3 * share for step, share in expected.items()}, abs=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
@pytest.mark.parametrize("scheduler", ["warmup_cosine", "linear", "cosine", "constant"])
def test_from_the_peak_on_the_rates_are_those_of_transformers_schedulers(scheduler, warmup, total):
    """Up to it each is transformers' of the step after, whose first step is at a rate of zero."""
    makers = {
        "linear": get_linear_schedule_with_warmup,
        "constant": lambda *schedule: get_constant_schedule_with_warmup(*schedule[:2]),
    }
    args = Namespace(scheduler=scheduler, learning_rate=0.3, warmup_steps=warmup, min_lr=0.0)
    peak = 1 if scheduler == "cosine" else max(1, warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    make = makers.get(scheduler, get_cosine_schedule_with_warmup)
    theirs, rates = make(optimizer, peak - 1, total), {}
    for step in range(1, total + 1):
        rates[step] = theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()
    warming_up = make(torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.3), warmup, 10**6)
    for step in range(1, total + 1):
        expected = rates[step] if step >= peak else 0.3 * warming_up.lr_lambdas[0](step)
        assert learning_rate_at(step, total, args) == pytest.approx(expected, abs=1e-12), step
        assert expected > 0  # no step is without effect


def logged_rates(output_dir):
    return [row["lr"] for row in metrics(output_dir) if "lr" in row]


def test_the_logged_rate_is_the_schedules_counted_in_optimizer_steps(flags, tmp_path):
    assert run(flags(tmp_path, scheduler="linear", warmup_steps=2, learning_rate=0.04)) == 0
    assert logged_rates(tmp_path) == pytest.approx(
        [0.02, 0.04, 0.032, 0.024, 0.016, 0.008], abs=1e-12
    )


def test_the_logged_rate_is_the_one_that_moves_the_weights(flags, tmp_path):
    """AdamW's first step moves a weight by the rate itself, whatever the size of its gradient."""
    argv = flags(
        tmp_path, max_steps=1, warmup_steps=4, learning_rate=0.04, weight_decay=0, log_interval=1
    )
    assert run(argv) == 0
    assert logged_rates(tmp_path) == [0.01]
    tensors = load_file(tmp_path / "final" / "adapter_model.safetensors")
    moved = torch.cat(
        [tensor.flatten() for name, tensor in tensors.items() if "lora_B" in name]
    ).abs()
    assert moved.median().item() == pytest.approx(0.01, rel=1e-3)


def test_warm_up_that_was_not_asked_for_is_a_tenth_of_the_run(flags, tmp_path):
    assert run(flags(tmp_path, max_steps=20, eval_fraction=0, learning_rate=1.0)) == 0
    rates = logged_rates(tmp_path)
    assert rates[:2] == [0.5, 1.0]
    assert 0.9 < rates[2] < 1.0


def test_a_constant_rate_warms_up_where_that_is_asked_for(flags, tmp_path):
    constant = {"scheduler": "constant", "max_steps": 3, "learning_rate": 0.8}
    assert run(flags(tmp_path / "plain", **constant)) == 0
    assert run(flags(tmp_path / "warmed", **constant, warmup_steps=2)) == 0
    assert logged_rates(tmp_path / "plain") == [0.8, 0.8, 0.8]
    assert logged_rates(tmp_path / "warmed") == [0.4, 0.8, 0.8]


def test_a_warm_up_longer_than_the_run_is_allowed_with_a_warning(flags, tmp_path, capsys):
    assert run(flags(tmp_path, max_steps=2, warmup_steps=8, learning_rate=0.8)) == 0
    assert logged_rates(tmp_path) == pytest.approx([0.1, 0.2])
    assert re.search(r"^WARNING:.*--warmup_steps 8", capsys.readouterr().out, re.M)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_plain_loss_row_by_row_whatever_the_batch_size_and_padding(
    rows, bytes_tokenizer
):
    model = technique_model("lora")
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    expected, tokens = plain_loss(model, dataset)
    right = plain_right(model, dataset)
    for batch_size, padding, grouped in (
        (1, "longest", False),
        (7, "longest", True),
        (26, "max_length", False),
    ):
        loader = data_pipeline.final_dataset_loader(
            dataset, tokenizer=bytes_tokenizer, batch_size=batch_size, padding=padding, group_by_length=grouped,
            max_length=96, num_workers=0, shuffle=False,
        )  # fmt: skip
        loss, count, accuracy = evaluate(SummedLoss(model), loader, CPU)
        assert (count, accuracy) == (tokens, pytest.approx(right / tokens))
        assert loss == pytest.approx(expected, abs=1e-5)


def test_evaluation_in_bf16_takes_the_logits_in_fp32(rows, bytes_tokenizer):
    """Logits around -100, as real GPT-2's are, lie 0.5 apart in bf16: that would shift the loss."""
    model = small_gpt2()
    with torch.no_grad():  # a common offset of all logits, which the softmax does not see
        model.lm_head.weight += 3.0
        model.transformer.ln_f.bias -= 1.0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    expected, _ = plain_loss(model, dataset)
    loader = data_pipeline.final_dataset_loader(
        dataset, tokenizer=bytes_tokenizer, num_workers=0, max_length=96, shuffle=False
    )
    bf16 = train_llm.Runtime(torch.device("cpu"), torch.bfloat16)
    loss, _, _ = evaluate(SummedLoss(model), loader, bf16)
    assert loss == pytest.approx(expected, abs=2e-3)


def test_evaluation_is_without_dropout_and_leaves_the_mode_as_it_was(rows, bytes_tokenizer):
    model = small_gpt2(resid_pdrop=0.5)
    kinds = {
        "text_format": FORMAT,
        "max_length": 96,
        "num_workers": 0,
        "tokenizer": bytes_tokenizer,
    }
    loader = data_pipeline.final_dataset_loader(rows, shuffle=False, **kinds)
    loss = SummedLoss(model).train()
    values = {evaluate(loss, loader, CPU) for _ in range(2)}
    assert len(values) == 1
    assert loss.training and model.training


@pytest.fixture(scope="module")
def technique_runs(flags, tmp_path_factory):
    """Every technique, trained for 4 steps with dropout."""
    directory = tmp_path_factory.mktemp("techniques")
    for name, settings in TECHNIQUES.items():
        settings = {
            "lora_dropout": 0.1,
            "dropout": 0.1,
            "max_steps": 4,
            "eval_interval": 2,
        } | settings
        assert run(flags(directory / name, **settings)) == 0
    return directory


def printed_loss(capsys):
    return re.findall(
        r"^Held-out loss: (\d+\.\d{4}) \| Held-out PPL: [\d.]+ \|", capsys.readouterr().out, re.M
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_best_alone_brings_its_own_settings_and_evaluates_to_the_best_loss_of_its_run(
    technique_runs, flags, tmp_path, capsys, technique
):
    best = min(loss for step, loss in held_out_losses(technique_runs / technique).items() if step)
    own = dict.fromkeys(("model_name_or_path", "text_format", "max_length"))
    argv = flags(tmp_path / "unused", adapter_path=technique_runs / technique / "best", **own)
    assert run([*argv, "--eval_only"]) == 0
    assert printed_loss(capsys) == [f"{best:.4f}"]
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_logged_held_out_loss_is_that_of_transformers_on_the_model_that_was_saved(
    technique_runs, rows, bytes_tokenizer, technique
):
    model = modify_llm.load_trained(technique_runs / technique / "final").eval()
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    loss, tokens = plain_loss(model, dataset.split(0.2, 42)[1])
    logged = metrics(technique_runs / technique)[-1]
    assert (logged["step"], logged["eval_tokens"]) == (4, tokens)
    assert logged["eval_loss"] == pytest.approx(loss, abs=1e-5)


def test_evaluation_starts_as_many_workers_as_it_is_told_to(flags, tmp_path, monkeypatch):
    started, start = [], multiprocessing.Process.start
    monkeypatch.setattr(
        multiprocessing.Process, "start", lambda self: (started.append(self), start(self))
    )
    for number in (0, 1):
        started.clear()
        assert run([*flags(tmp_path / "unused", num_workers=number), "--eval_only"]) == 0
        assert len(started) == number


def test_rows_of_hundreds_of_tokens_have_the_loss_that_transformers_gives_them(
    flags, tmp_path, bytes_tokenizer
):
    small_gpt2(n_positions=512).save_pretrained(tmp_path / "long")
    bytes_tokenizer.save_pretrained(tmp_path / "long")
    text = [
        {"q": "Q", "a": "".join(random.Random(k).choices("abc de", k=k))}
        for k in (500, 450, 380, 120, 3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(text))
    files = dict.fromkeys(("dataset_path", "eval_dataset_path"), tmp_path / "rows.json")
    settings = {
        "max_length": 512,
        "max_steps": 1,
        "modification_type": "full",
        "max_grad_norm": 0,
        "batch_size": 1,
    }
    argv = flags(tmp_path / "out", **files, **settings, model_name_or_path=tmp_path / "long")
    assert run([*argv, "--gradient_accumulation_steps=5"]) == 0
    model = small_gpt2(n_positions=512)
    dataset = data_pipeline.load_dataset(
        tmp_path / "rows.json", bytes_tokenizer, text_format=FORMAT
    )
    loss, _ = plain_loss(model, dataset, backward=True)
    assert held_out_losses(tmp_path / "out")[0] == pytest.approx(loss, abs=1e-5)
    ours = first_gradients(tmp_path / "out")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_without_an_adapter_the_untouched_base_is_evaluated(
    technique_runs, flags, tmp_path, capsys
):
    assert run([*flags(tmp_path / "unused"), "--eval_only"]) == 0
    assert printed_loss(capsys) == [f"{held_out_losses(technique_runs / 'lora')[0]:.4f}"]


def test_rows_beyond_the_models_positions_are_refused_in_evaluation_too(
    technique_runs, flags, tmp_path, capsys
):
    (tmp_path / "long.json").write_text(json.dumps([{"q": "Q", "a": "a" * 300}] * 2))
    argv = flags(tmp_path / "out", adapter_path=technique_runs / "lora" / "best", max_length=200)
    argv += ["--eval_dataset_path", str(tmp_path / "long.json"), "--eval_only"]
    assert "--max_length 200" in refused(argv, capsys)


@pytest.mark.parametrize("technique", ["lora", "key_value", "full"])
def test_adapter_path_goes_on_from_what_an_earlier_run_saved(
    technique_runs, flags, tmp_path, technique
):
    source = technique_runs / technique
    before = snapshot(source)
    argv = flags(tmp_path, adapter_path=source / "best", model_name_or_path=None, max_steps=2)
    assert run(argv) == 0
    best = min(loss for step, loss in held_out_losses(source).items() if step)
    after = held_out_losses(tmp_path)
    assert after[0] == pytest.approx(best, rel=1e-6)
    assert after[2] != pytest.approx(best, rel=1e-6)
    steps = load_file(checkpoints(tmp_path)[-1] / "optimizer.safetensors")
    assert {float(tensor) for name, tensor in steps.items() if name.endswith(".step")} == {2.0}
    assert snapshot(source) == before


def test_a_base_given_by_name_is_taken_even_where_the_name_is_the_flags_default(
    technique_runs, capsys
):
    argv = [
        "--adapter_path",
        str(technique_runs / "lora" / "best"),
        "--model_name_or_path=gpt2",
        "--prompt=x",
    ]
    assert "--model_name_or_path gpt2: " in refused(argv, capsys)


def test_an_adapters_own_technique_decides_the_learning_rate(technique_runs, flags, tmp_path):
    argv = flags(
        tmp_path, adapter_path=technique_runs / "prefix" / "best", learning_rate=None, max_steps=1
    )
    assert run([*argv, "--scheduler=constant"]) == 0
    assert logged_rates(tmp_path) == [
        modify_llm.TECHNIQUES["prefix"].learning_rate(
            modify_llm.with_defaults(modification_type="prefix")
        )
    ]


# ---- what a run writes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """(output directory, stdout, stderr) of a run of two epochs through the script, on a terminal without emoji."""
    directory = tmp_path_factory.mktemp("finished") / "out"
    argv = flags(
        directory, max_steps=None, epochs=2, num_samples=2, max_new_tokens=5, log_interval=2
    )
    process = script(argv, PYTHONIOENCODING="cp1252")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return directory, out.decode("cp1252"), err.decode()


def test_a_run_leaves_exactly_these_files(finished):
    directory = finished[0]
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    logs = {name for name in names if re.fullmatch(r"training_\d{8}_\d{6}\.log", name)}
    assert len(logs) == 1
    assert names - logs == {
        "run.json", "metrics.jsonl", "training_curves.png", "predictions.jsonl", "checkpoints", "best", "final"
    }  # fmt: skip
    assert not hidden_leftovers(directory)
    assert [path.name for path in checkpoints(directory)] == ["step_00000006", "step_00000012"]
    for place in ("best", "final"):
        held = {path.name for path in (directory / place).iterdir()}
        assert {
            "adapter_model.safetensors",
            "adapter_config.json",
            "modification.json",
            "tokenizer.json",
        } <= held
    assert (directory / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_checkpoints_hold_trained_tensors_and_json_alone(finished):
    for directory in checkpoints(finished[0]):
        assert {file.suffix for file in directory.iterdir()} == {".safetensors", ".json"}
        names = load_file(directory / "trainable.safetensors")
        assert len(names) == 2 * 8 and all(".lora_" in name for name in names)


def test_a_lora_checkpoint_of_gpt2_small_stays_below_ten_megabytes(finished):
    """12 bytes a trained parameter (the weight and AdamW's two moments, fp32), and some hundreds a tensor."""
    directory = checkpoints(finished[0])[-1]
    tensors = load_file(directory / "trainable.safetensors")
    size = sum(file.stat().st_size for file in directory.iterdir())
    rest = size - 12 * sum(tensor.numel() for tensor in tensors.values())
    assert 0 < rest < 20_000 + 1000 * len(tensors)
    small = 12 * (4 * 768 + 2304 * 4 + 4 * 768 + 768 * 4 + 4 * 768 + 3072 * 4 + 4 * 3072 + 768 * 4)
    assert small == 589_824
    assert 12 * small + 20_000 + 1000 * 12 * 8 < 10e6


def test_metrics_rows_have_these_keys_and_perplexity_is_exp_of_loss(finished):
    lines = (finished[0] / "metrics.jsonl").read_text().splitlines()
    rows_ = [json.loads(line) for line in lines]
    training, held_out = [r for r in rows_ if "loss" in r], [r for r in rows_ if "loss" not in r]
    assert [row["step"] for row in training] == [2, 4, 6, 8, 10, 12]
    assert [row["epoch"] for row in training] == [0, 0, 0, 1, 1, 1]
    assert [(row["step"], row["epoch"]) for row in held_out] == [(0, 0), (6, 0), (12, 1)]
    for row in training:
        assert list(row) == [
            "step",
            "epoch",
            "loss",
            "perplexity",
            "lr",
            "grad_norm",
            "tokens_per_second",
        ]
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["grad_norm"] > 0 and row["tokens_per_second"] > 0
    for row in held_out:
        assert list(row) == [
            "step",
            "epoch",
            "eval_loss",
            "eval_perplexity",
            "eval_accuracy",
            "eval_tokens",
        ]
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))


def test_a_training_row_is_the_token_weighted_mean_since_the_row_before(
    flags, tmp_path, rows, bytes_tokenizer
):
    """With a rate too small to move a weight, an epoch's rows average to the base's own loss over the training rows."""
    argv = flags(
        tmp_path,
        max_steps=None,
        epochs=1,
        learning_rate=1e-30,
        log_interval=100,
        scheduler="constant",
    )
    assert run(argv) == 0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    expected, _ = plain_loss(small_gpt2(), dataset.split(0.2, 42)[0])
    assert training_losses(tmp_path) == [pytest.approx(expected, rel=1e-6)]


def test_run_json_records_every_setting_and_the_dataset(finished):
    record = json.loads((finished[0] / "run.json").read_text())
    assert record["settings"].keys() == train_llm.DEFAULTS.keys()
    assert record["settings"]["learning_rate"] == 0.01
    assert {"python", "torch", "transformers"} <= record["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{64}", record["dataset_sha256"])


LOG_LINES = (
    r"INFO:__main__: *Using device: cpu",
    r"INFO:__main__: *Model Parameters:",
    r"   Total: [\d,]+",
    r"   Trainable: 4,096 \(9\.78%\)",
    r"INFO:__main__: *Training batches: 6",
    r"Epoch 0 \| Step    2/6 \| Loss: \d+\.\d{4} \| PPL: \d+\.\d\d \| LR: \d\.\d\de[+-]\d\d"
    r" \| Grad: \d+\.\d{3} \| [\d,]+ tok/s",
    r"Epoch 1 \| Step    6/6 \| Loss: .*",
)


@pytest.mark.parametrize("line", LOG_LINES)
def test_stdout_has_the_line_and_a_cp1252_terminal_gets_it_without_emoji(finished, line):
    assert re.search(rf"^{line}\r?$", finished[1], re.M)


@pytest.mark.parametrize("line", LOG_LINES)
def test_the_log_file_has_the_line_with_its_emoji(finished, line):
    log = next(finished[0].glob("training_*.log")).read_text(encoding="utf-8")
    decorated = line.replace("__main__: *", "__main__:[🔧📊🔢] ")
    assert re.search(rf"^{decorated}$", log, re.M)


def test_the_progress_bar_shows_the_loss_the_speed_and_the_time_left(
    flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(flags(tmp_path, max_steps=3)) == 0
    shown = capsys.readouterr().err
    assert re.search(r"training: .* 3/3 \[\d+:\d+<\d+:\d+, .*loss \d+\.\d+, [\d,]+ tok/s\]", shown)


def test_nothing_but_errors_and_progress_goes_to_stderr(finished):
    assert not re.search(r"Traceback|Error|Warning", finished[2])


def test_a_saved_model_with_a_flipped_byte_is_refused_but_its_card_may_be_edited(
    technique_runs, tmp_path, flags, capsys
):
    saved = shutil.copytree(technique_runs / "lora" / "final", technique_runs / "lora" / "copy")
    (saved / "README.md").write_text("a card of my own")
    modify_llm.load_trained(saved)
    weights = bytearray((saved / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "adapter_model.safetensors").write_bytes(weights)
    said = refused([*flags(tmp_path / "unused", adapter_path=saved), "--eval_only"], capsys)
    assert "adapter_model.safetensors is damaged" in said


def failing(*_, **__):
    raise OSError("no such luck")


def test_what_fails_after_final_is_a_warning_and_made_up_for_later(
    flags, tmp_path, monkeypatch, capsys
):
    argv = flags(tmp_path / "out", max_steps=2, num_samples=1)

    def failing_after_final(run):
        modify_llm.verify_directory(run.output_dir / "final")
        failing()

    with monkeypatch.context() as patch:
        patch.setitem(train_llm.EXTRAS, "predictions.jsonl", failing_after_final)
        assert run(argv) == 0
    said = capsys.readouterr().out
    assert re.search(r"^WARNING:\S+:predictions.jsonl: no such luck; the run goes on", said, re.M)
    assert "Written to" in said and "predictions.jsonl" not in said.partition("Written to")[2]
    before = saved(tmp_path / "out" / "final")
    assert run([*argv, "--resume_from=auto"]) == 0
    assert (tmp_path / "out" / "predictions.jsonl").exists()
    assert saved(tmp_path / "out" / "final") == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_takes_the_same_steps(flags, tmp_path):
    for name, compiled in (("plain", []), ("compiled", ["--compile"])):
        assert run([*flags(tmp_path / name, max_steps=3, num_samples=0), *compiled]) == 0
    losses = training_losses(tmp_path / "plain"), training_losses(tmp_path / "compiled")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain, compiled = (
        load_file(tmp_path / n / "final/adapter_model.safetensors") for n in ("plain", "compiled")
    )
    for name, tensor in plain.items():
        # AdamW takes steps of 1e-2 whatever a gradient's size: where one is next to nothing, rounding shows
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_model_card_is_the_hubs_and_its_lines_load_the_model(
    technique_runs, technique, small_base
):
    """By PEFT or transformers, and by our own function: to the same logits."""
    directory = technique_runs / technique / "final"
    card = ModelCard.load(directory / "README.md")
    library = {"adapter": None, "selective": "transformers", "full": "transformers"}
    expected = {"library_name": library.get(technique, "peft"), "pipeline_tag": "text-generation"}
    assert card.data.to_dict() == {k: v for k, v in expected.items() if v}  # a local base: no name
    before, *_, after = held_out_losses(technique_runs / technique).values()
    assert f": {math.exp(before):.2f} -> {math.exp(after):.2f}\n" in card.text
    scope = {
        "PeftModel": PeftModel,
        "AutoModelForCausalLM": GPT2LMHeadModel,
        "modify_llm": modify_llm,
    }
    ids, logits = torch.arange(40, 60)[None], []
    lines = card.text.split("```python\n")[1].split("```")[0]
    lines = lines.replace('"DIR"', repr(str(directory))).replace('"BASE"', repr(str(small_base)))
    for line in lines.splitlines():
        exec(line, scope)
        logits.append(
            scope["model"].eval()(input_ids=ids).logits[:, -20:]
        )  # PEFT keeps a prompt's own logits
    if len(logits) > 1:  # the last two lines: the library's way, and ours
        torch.testing.assert_close(logits[-1], logits[-2])


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_no_file_of_a_result_names_a_directory_of_this_machine(
    technique_runs, technique, small_base, tmp_path
):
    results = [technique_runs / technique / name for name in ("best", "final")]
    if technique in ("lora", "thirds"):
        modify_llm.merge_directory(str(results[0]), str(tmp_path / "merged"), None)
        results.append(tmp_path / "merged")
        merged = ModelCard.load(tmp_path / "merged" / "README.md").data.to_dict()
        assert merged == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for file in itertools.chain.from_iterable(path.iterdir() for path in results):
        for absolute in (technique_runs, small_base, Path.cwd()):
            quoted = f'"{absolute}'.encode()
            assert quoted not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("gpt2", "mit"),
        ("openai-community/gpt2-xl", "mit"),
        ("distilgpt2", "apache-2.0"),
        ("somebody/gpt2", None),
    ],
)
def test_a_card_names_a_base_of_the_hub_and_its_licence_where_it_is_known(base, licence):
    metadata = ModelCard(modify_llm.card_metadata(base, "peft")).data
    assert (metadata.base_model, metadata.license) == (base, licence)


def test_predictions_hold_reference_base_and_tuned_answers(
    finished, small_base, rows, bytes_tokenizer
):
    lines = (finished[0] / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    texts = [(row["q"], row["a"]) for row in json.loads(rows.read_text())]
    base = GPT2LMHeadModel.from_pretrained(small_base)
    assert len(predictions) == 2
    for row in predictions:
        assert list(row) == ["prompt", "reference", "base", "tuned", "stopped"]
        assert (row["prompt"], row["reference"]) in texts
        ids = torch.tensor([bytes_tokenizer(row["prompt"])["input_ids"]])
        answer = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=EOS,
        )[0, ids.shape[1] :]
        untuned = bytes_tokenizer.decode([token for token in answer.tolist() if token != EOS])
        assert row["base"] == (
            untuned if EOS in answer else untuned.removesuffix("\ufffd")  # cut in half
        )
        assert isinstance(row["stopped"], bool)


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(flags, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(flags(tmp_path, max_steps=2, report_to="tensorboard")) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        training_losses(tmp_path), rel=1e-6
    )
    assert {event.step: event.value for event in events.Scalars("eval_loss")} == pytest.approx(
        held_out_losses(tmp_path)
    )


def test_tensorboard_gets_the_settings_and_an_answer_an_evaluation(flags, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert (
        run(flags(tmp_path, max_steps=2, report_to="tensorboard", num_samples=1, max_new_tokens=2))
        == 0
    )
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert (
        b"learning_rate: 0.01"
        in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    )
    assert [event.step for event in events.Tensors("samples/text_summary")] == [2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_report_to_a_package_that_is_not_there_is_refused(
    name, flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    assert f"pip install {name}" in refused(flags(tmp_path / "out", report_to=name), capsys)


def test_trackers_get_settings_numbers_and_samples_offline(flags, tmp_path):
    """In what wandb and trackio themselves write."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    places = {"WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path), "TRACKIO_PROJECT": "mine"}
    settings = {"max_steps": 2, "num_samples": 1, "max_new_tokens": 2}
    argv = flags(tmp_path / "out", report_to="wandb,trackio,tensorboard", **settings)
    process = script(argv, WANDB_MODE="offline", **places)
    assert process.wait(timeout=200) == 0, process.stderr.read()
    losses = [*training_losses(tmp_path / "out"), *held_out_losses(tmp_path / "out").values()]
    written = next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    assert all(json.dumps(loss).encode() in written for loss in losses)
    assert b"learning_rate" in written
    assert len([*tmp_path.glob("wandb/offline-run-*/files/media/table/samples_2_*.json")]) == 1
    with closing(sqlite3.connect(tmp_path / "mine.db")) as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
        config = json.loads(database.execute("select config from configs").fetchone()[0])
    logged = [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]
    assert sorted(logged) == sorted(losses)
    assert any("samples" in row for row in rows) and config["learning_rate"] == 0.01
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def test_a_tracker_that_fails_is_a_warning_and_is_left_out(flags, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    monkeypatch.setattr(wandb, "log", failing)
    assert run(flags(tmp_path, report_to="wandb", max_steps=2)) == 0
    said = capsys.readouterr().out
    assert said.count("--report_to wandb: no such luck; the run goes on without") == 1


# ---- flags from a file ---------------------------------------------------------------------------


def test_a_run_is_repeated_to_the_bit_from_its_run_json(finished, tmp_path):
    config = finished[0] / "run.json"
    assert run(["--config", str(config), "--output_dir", str(tmp_path / "again")]) == 0
    assert outcome(tmp_path / "again") == outcome(finished[0])
    settings = [
        json.loads((path / "run.json").read_text())["settings"]
        for path in (finished[0], tmp_path / "again")
    ]
    differ = {name for name, value in settings[0].items() if value != settings[1][name]}
    assert differ <= {"config", "output_dir"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.yaml", "epochs: 1\nreport_to: [a\nlora_rank: 2\n", "line 3: expected ',' or ']'"),
        ("c.json", '{"epochs": 1,\n}', "Expecting property name enclosed in double quotes: line 2"),
        ("c.json", '{"epochs": 0}', "epochs: "),
    ],
)
def test_a_file_of_flags_that_cannot_be_read_is_told_by_line_or_flag(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"--config {tmp_path / name}: {said}")):
        train_llm.read_config(tmp_path / name)


def test_the_command_line_stands_above_a_yaml_file_of_flags(flags, tmp_path):
    pairs = [flag.removeprefix("--").split("=", 1) for flag in flags(tmp_path / "out")]
    lines = [f"{name}: {json.dumps(value)}" for name, value in pairs]
    lines = [*lines, "freeze_layers: [0]", "lora_rank: 2", "max_grad_norm: 1e-1"]
    (tmp_path / "flags.yaml").write_text("\n".join(lines))
    assert run(["--config", str(tmp_path / "flags.yaml"), "--max_steps=1", "--lora_rank=3"]) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    expected = {"max_steps": 1, "lora_rank": 3, "freeze_layers": [0], "max_grad_norm": 0.1}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"lerning_rate": 1}', "lerning_rate: no such flag; did you mean learning_rate?"),
        ('{"lora_rank": 0}', "lora_rank: '0': expected int >= 1"),
        ("[1, 2]", "flags.json"),
        ("{", "flags.json"),
    ],
)
def test_a_file_of_flags_is_checked_as_the_command_line_is(content, told, tmp_path, capsys):
    path = tmp_path / "flags.json"
    path.write_text(content)
    said = refused(["--config", str(path), "--dataset_path", "x"], capsys)
    assert f"--config {path}" in said and told in said


def test_a_run_goes_on_with_its_own_settings(flags, half, half_done, tmp_path, capsys):
    again, changed = (shutil.copytree(half, tmp_path / name) for name in ("again", "changed"))
    assert run(["--output_dir", str(half), *RESUME]) == 0
    assert run(["--resume_from", str(again)]) == 0
    assert outcome(half) == outcome(again) == half_done[1]
    assert "--lora_rank 4, not 2" in refused(
        ["--resume_from", str(changed), "--lora_rank=2"], capsys
    )


def test_a_misspelt_flag_or_path_gets_the_nearest_one(flags, tmp_path, rows, capsys):
    told = refused([*flags(tmp_path / "out"), "--lerning_rate=1"], capsys)
    assert "--lerning_rate: no such flag; did you mean --learning_rate?" in told
    told = refused(flags(tmp_path / "out", dataset_path=rows.with_name("row.json")), capsys)
    assert told.endswith("; did you mean rows.json?\n")


# ---- checkpoints: rotation, early stopping ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worse_and_worse(flags, tmp_path_factory):
    """Flags of a run whose held-out rows are the opposite of what it trains on: the first evaluation stays the best."""
    directory = tmp_path_factory.mktemp("opposites")
    for name, letter in (("trained", "a"), ("held_out", "z")):
        (directory / f"{name}.json").write_text(json.dumps([{"q": "Q", "a": letter * 9}] * 8))

    def build(output_dir, **changes):
        files = {
            "dataset_path": directory / "trained.json",
            "eval_dataset_path": directory / "held_out.json",
        }
        return flags(output_dir, eval_interval=1, scheduler="constant", **files, **changes)

    return build


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_keeps_the_newest_and_the_best(worse_and_worse, tmp_path, limit):
    assert run(worse_and_worse(tmp_path, save_total_limit=limit)) == 0
    losses = held_out_losses(tmp_path)
    assert min(range(1, 7), key=losses.get) == 1
    kept = [1, *range(7 - limit, 7)]
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{step:08d}" for step in kept]


def test_without_an_intervening_best_only_the_newest_checkpoints_stay(flags, tmp_path):
    assert run(flags(tmp_path, save_interval=1, save_total_limit=2, eval_interval=6)) == 0
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000005", "step_00000006"]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(flags, tmp_path, capsys, monkeypatch):
    rename = Path.rename

    def held(path, target):
        if Path(target).name.startswith(".trash_step_00000002_"):
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", held)
    assert run(flags(tmp_path, save_interval=1, save_total_limit=1, eval_fraction=0)) == 0
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000006"]
    assert re.search(
        r"^WARNING:.*step_00000002: cannot be removed: .*denied", capsys.readouterr().out, re.M
    )


def test_early_stopping_counts_evaluations_without_gain_and_finishes_the_run(
    worse_and_worse, tmp_path
):
    argv = worse_and_worse(tmp_path, max_steps=40, early_stopping_patience=3)
    assert run(argv) == 0
    assert list(held_out_losses(tmp_path)) == [0, 1, 2, 3, 4]
    assert saved(tmp_path / "final") != saved(tmp_path / "best")
    before = snapshot(tmp_path)
    assert run([*argv, *RESUME]) == 0
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([5.0, 5.5, 5.6], "is above that before the first step"),
        ([5.0, 4.0, 4.1, 4.2, 4.3], "has not fallen for two evaluations"),
        ([5.0, 4.0, 4.1, 3.9], None),
    ],
)
def test_a_held_out_loss_that_gets_worse_is_told_once_with_what_to_try(
    losses, told, flags, tmp_path, monkeypatch, capsys
):
    given = iter(losses)
    monkeypatch.setattr(train_llm, "evaluate", lambda *_: (next(given), 10, 0.5))
    assert run(flags(tmp_path, max_steps=len(losses) - 1, eval_interval=1)) == 0
    lines = re.findall(r"WARNING:train_llm:The held-out loss (.*)", capsys.readouterr().out)
    assert [line.split(":")[0] for line in lines[:1]] == ([told] if told else [])
    assert all("--learning_rate" in line and "best/" in line for line in lines)


def test_few_held_out_tokens_and_a_full_rate_on_an_adapter_are_told(flags, tmp_path, capsys):
    assert run(flags(tmp_path / "a", max_steps=1)) == 0
    assert re.search(r"WARNING:\S+:\d+ tokens are held out: a perpl", capsys.readouterr().out)
    assert run(flags(tmp_path / "b", max_steps=1, adapter_path=tmp_path / "a")) == 0  # its best/
    out = capsys.readouterr().out
    assert f"--learning_rate 0.01 at first loses part of what {tmp_path / 'a' / 'best'}" in out


# ---- stopped and resumed ---------------------------------------------------------------------------------------------

# 10 optimizer steps over nearly two epochs of 6, 19 micro-batches (the 11th is alone in its step), rows of the log and
# checkpoints that fall on other steps, and every source of randomness in use.
DRAWN = {
    "max_steps": 10, "lora_dropout": 0.1, "dropout": 0.1, "num_workers": 1, "log_interval": 3, "eval_interval": 4,
    "save_interval": 3, "temperature": 0.9, "num_samples": 1, "max_new_tokens": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def never_stopped(flags, tmp_path_factory):
    directory = tmp_path_factory.mktemp("never_stopped") / "out"
    assert run(flags(directory, **DRAWN)) == 0
    return outcome(directory)


@pytest.mark.parametrize(
    ("micro_step", "step", "by"),
    [
        (1, 1, signal.SIGTERM),
        (4, 2, signal.SIGINT),
        (7, 4, signal.SIGTERM),
        (11, 6, signal.SIGINT),
        (12, 7, signal.SIGTERM),
        (19, 10, signal.SIGTERM),
    ],
)
def test_a_stopped_run_leaves_a_checkpoint_and_resumes_to_the_same_bits(
    flags, tmp_path, capsys, never_stopped, micro_step, step, by
):
    argv = flags(tmp_path, **DRAWN)
    with stopped_in(micro_step, by):
        assert run(argv) == 128 + by
    assert checkpoints(tmp_path)[-1].name == f"step_{step:08d}"
    assert not (tmp_path / "final").exists()
    assert re.search(
        rf"Stopped by {by.name} at step {step}\b.*--resume_from auto", capsys.readouterr().out
    )
    assert run([*argv, *RESUME]) == 0
    assert f"at step {step}\n" in capsys.readouterr().out
    assert outcome(tmp_path) == never_stopped


def test_a_run_stopped_in_every_step_equals_one_that_never_was(flags, tmp_path, never_stopped):
    argv = flags(tmp_path, **DRAWN)
    for step in range(1, 11):
        with stopped_in(1):
            assert run([*argv, *RESUME]) == 143
        assert checkpoints(tmp_path)[-1].name == f"step_{step:08d}"
    assert run([*argv, *RESUME]) == 0
    assert outcome(tmp_path) == never_stopped


@pytest.mark.parametrize("evaluation", [1, 4, 8])
def test_a_run_stopped_while_evaluating_resumes_to_the_same_bits(
    flags, tmp_path, never_stopped, evaluation
):
    argv = flags(tmp_path, **DRAWN)
    with stopped_in(evaluation, training=False):
        assert run(argv) == 143
    assert run([*argv, *RESUME]) == 0
    assert outcome(tmp_path) == never_stopped


def test_a_run_stopped_in_its_last_evaluation_is_finished_once_resumed(flags, tmp_path, capsys):
    argv = flags(tmp_path, max_steps=2, eval_interval=2)
    with stopped_in(4, training=False):  # 3 batches before the first step, then the last ones
        assert run(argv) == 143
    assert run([*argv, *RESUME]) == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert run([*argv, *RESUME]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_a_signal_during_an_evaluation_is_heeded_before_it_ends(flags, tmp_path):
    evaluated = []
    with stopped_in(1, training=False), pytest.MonkeyPatch.context() as patch:
        inner = SummedLoss.forward
        patch.setattr(SummedLoss, "forward", lambda *a, **k: evaluated.append(1) or inner(*a, **k))
        assert run(flags(tmp_path)) == 143
    assert len(evaluated) == 1  # of three batches
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_a_signal_in_the_middle_of_a_save_lets_the_save_complete(
    flags, tmp_path, monkeypatch, never_stopped
):
    argv, synced, fsync = flags(tmp_path, **DRAWN), itertools.count(1), os.fsync

    def signalled(descriptor):
        if next(synced) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", signalled)
        assert run(argv) == 143
    assert checkpoints(tmp_path)[-1].name == "step_00000003"
    assert not hidden_leftovers(tmp_path)
    assert run([*argv, *RESUME]) == 0
    assert outcome(tmp_path) == never_stopped


@pytest.mark.parametrize("technique", ["lora", "full"])
def test_a_run_in_parts_takes_the_same_steps_a_backward_pass_after_each_part(
    flags, tmp_path, base_dir, monkeypatch, technique
):
    forward, backward, seen, rows = SummedLoss.forward, torch.Tensor.backward, [], []
    monkeypatch.setattr(
        SummedLoss, "forward", lambda *a, **k: seen[-1].append("f") or forward(*a, **k)
    )
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *a, **k: seen[-1].append("b") or backward(*a, **k)
    )
    for at_once in (10**6, 20):
        monkeypatch.setattr(train_llm, "CPU_TOKENS", at_once)
        seen.append([])
        changes = {
            "model_name_or_path": base_dir,
            "eval_fraction": 0,
            "max_length": 64,
            "learning_rate": 1e-3,
        }
        assert run(flags(tmp_path / str(at_once), modification_type=technique, **changes)) == 0
        rows.append([(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / str(at_once))])
    whole, parts = ("".join(passes) for passes in seen)
    assert whole == "fb" * 2 * len(rows[0])  # micro-batches
    assert parts == "fb" * (len(parts) // 2)  # the activations of one part at a time
    assert (len(parts) > 1.5 * len(whole)) if technique == "lora" else (parts == whole)
    for mine, reference in zip(*rows, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4)


def test_an_evaluation_in_parts_is_the_evaluation(rows, bytes_tokenizer, monkeypatch):
    summed_loss = SummedLoss(small_gpt2())
    kinds = {
        "text_format": FORMAT,
        "padding": "longest",
        "num_workers": 0,
        "tokenizer": bytes_tokenizer,
    }
    loader, found = data_pipeline.final_dataset_loader(rows, **kinds), []
    for at_once in (10**6, 20):
        monkeypatch.setattr(train_llm, "CPU_TOKENS", at_once)
        found.append(evaluate(summed_loss, loader, CPU))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_the_mapped_file_of_the_base_is_let_go_before_training(base_dir):
    maps, file = Path("/proc/self/maps"), str((base_dir / "model.safetensors").resolve())
    if not maps.exists():
        pytest.skip("only Linux lists a process's mapped files")
    gc.collect()  # models of other tests
    for technique in ("lora", "selective"):
        model = modify_llm.final_modify(
            modification_type=technique, freeze_layers="0", model_name_or_path=str(base_dir)
        )
        assert file in maps.read_text()
        train_llm.prepare_model(
            model, train_llm.resolve({"dataset_path": "-"}), Runtime(CPU.device, torch.bfloat16)
        )
        assert file not in maps.read_text()


def test_signal_handlers_are_put_back_after_a_run(flags, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run(flags(tmp_path, max_steps=1)) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_directory_that_was_moved_resumes_to_the_same_bits(flags, tmp_path, never_stopped):
    with stopped_in(5):
        assert run(flags(tmp_path / "here", **DRAWN)) == 143
    (tmp_path / "here").rename(tmp_path / "there")
    assert run([*flags(tmp_path / "there", **DRAWN), *RESUME]) == 0
    assert outcome(tmp_path / "there") == never_stopped


def test_a_run_resumed_within_the_second_adds_to_its_log(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_llm, "datetime", Namespace(now=lambda: datetime(2026, 1, 2)))
    with stopped_in(1):
        assert run(flags(tmp_path)) == 143
    assert run([*flags(tmp_path), *RESUME]) == 0
    (log,) = tmp_path.glob("training_*.log")
    assert [
        word
        for word in ("Stopped by", "Resumed from")
        if word not in log.read_text(encoding="utf-8")
    ] == []


def test_a_run_directory_that_is_not_there_is_named(flags, tmp_path, capsys):
    for argv in (flags(tmp_path / "run"), []):
        for path in (tmp_path / "rum", tmp_path / ("r" * 300)):
            with pytest.raises(SystemExit, match="2"):
                train_llm.main([*argv, "--resume_from", str(path)])
            assert f"--resume_from {path}: no such directory" in capsys.readouterr().err


def test_held_out_rows_that_are_trained_on_too_are_counted(flags, tmp_path, capsys, rows):
    argv = flags(tmp_path, eval_dataset_path=rows, max_eval_samples=3, max_steps=1)
    assert train_llm.main(argv) == 0
    assert "3 of 3 held-out rows are also trained on" in capsys.readouterr().out


def test_resume_auto_without_a_checkpoint_warns_and_starts_at_step_0(flags, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"st')
    assert run([*flags(tmp_path, max_steps=1), *RESUME]) == 0
    assert re.search(r"^WARNING:.*no good checkpoint.*step 0", capsys.readouterr().out, re.M)
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 1]


# ---- a half-done run, and what may befall it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_done(flags, tmp_path_factory):
    """(a run of 6 steps, stopped after the 5th with checkpoints at 2, 4 and 5; what it would have come to)."""
    directory = tmp_path_factory.mktemp("half_done")
    with stopped_in(9):
        assert run(flags(directory / "stopped", eval_interval=2)) == 143
    assert [path.name[-1] for path in checkpoints(directory / "stopped")] == ["2", "4", "5"]
    assert run(flags(directory / "whole", eval_interval=2)) == 0
    return directory / "stopped", outcome(directory / "whole")


@pytest.fixture
def half(half_done, tmp_path):
    """A copy of the half-done run, to damage."""
    return Path(shutil.copytree(half_done[0], tmp_path / "out"))


def test_a_longer_run_that_is_killed_before_its_final_is_not_taken_for_finished(flags, half):
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert run([*flags(half, eval_interval=2, max_steps=8), *RESUME]) == 0
    shutil.copytree(half / "final", half / "longer")
    shutil.rmtree(half / "final")
    # as a kill leaves it between the last checkpoint and final/: the shorter run's is still there
    assert run([*flags(half.parent / "short", eval_interval=2)]) == 0
    shutil.copytree(half.parent / "short" / "final", half / "final")
    assert run([*flags(half, eval_interval=2, max_steps=8), *RESUME]) == 0
    assert saved(half / "final") == saved(half / "longer")


def test_a_run_resumed_from_an_older_checkpoint_leaves_the_newer_ones(flags, half):
    older = half / "checkpoints" / "step_00000002"
    with stopped_in(2):
        assert run([*flags(half, eval_interval=2), "--resume_from", str(older)]) == 143
    assert [path.name[-1] for path in checkpoints(half)] == ["2", "3"]


def test_checkpoints_on_another_disk_resume_by_their_path_and_are_overwritten(
    flags, half, tmp_path
):
    disk = tmp_path / "disk" / "ck"
    disk.parent.mkdir()
    shutil.move(half / "checkpoints", disk)
    (half / "checkpoints").symlink_to(disk)
    step = half / "checkpoints" / "step_00000004"
    assert run([*flags(half, eval_interval=2), "--resume_from", str(step)]) == 0
    assert not (disk.parent / "run.json").exists()
    with stopped_in(4):
        argv = [*flags(half, eval_interval=2), "--overwrite_output_dir"]
        assert run(argv) == 143
    assert [path.name[-1] for path in disk.iterdir()] == ["2"]


def test_a_result_whose_checkpoints_are_gone_is_not_started_over(flags, half, capsys):
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    shutil.rmtree(half / "checkpoints")
    before = snapshot(half)
    said = refused([*flags(half, lora_rank=2), *RESUME], capsys)
    assert "no checkpoint" in said and "--overwrite_output_dir" in said
    assert snapshot(half) == before


def test_a_run_that_goes_on_elsewhere_speaks_of_no_best_that_is_not_there(flags, half, capsys):
    elsewhere = half.parent / "elsewhere"
    argv = [*flags(elsewhere, eval_interval=2, max_steps=8), "--resume_from", str(half)]
    assert run(argv) == 0
    out = capsys.readouterr().out
    assert f"best/ of the steps before stays in {half}" in out
    step = re.search(r"best [\d.]+ at step (\d+)", out)[1]
    assert train_llm.step_of(elsewhere / "best") == int(step)


def test_the_epochs_given_stand_above_the_steps_of_the_run(flags, half, capsys):
    assert run(["--resume_from", str(half), "--epochs", "2"]) == 0
    assert checkpoints(half)[-1].name == "step_00000012"  # 2 x 6 steps


def test_run_json_survives_a_disk_that_is_full_when_it_is_written_again(
    flags, half, in_new_process
):
    before = (half / "run.json").read_text()
    argv = [*flags(half, eval_interval=2), *RESUME]
    assert in_new_process(argv, half, file_limit=500) == 1
    assert (half / "run.json").read_text() == before


def test_the_config_says_which_run_goes_on(flags, half, tmp_path, monkeypatch, capsys):
    config = tmp_path / "flags.yaml"
    config.write_text(f"output_dir: {half}\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run.json").write_text('{"settings": {"learning_rate": 0.5}}')
    assert run(["--config", str(config), *RESUME]) == 0
    assert "at step 5" in capsys.readouterr().out


def test_a_start_that_is_refused_leaves_the_directory_of_the_one_at_work(
    flags, tmp_path, monkeypatch, capsys
):
    def at_work(self, timeout):
        raise filelock.Timeout(".lock")

    monkeypatch.setattr(filelock.FileLock, "acquire", at_work)
    assert "another run writes there" in refused(flags(tmp_path / "new" / "out"), capsys)
    assert (tmp_path / "new" / "out").is_dir()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path):
    """As a start does that was refused, and that had made the directory."""
    acquire, taken = filelock.FileLock.acquire, []

    def after_a_removal(lock, **settings):
        proxy = acquire(lock, **settings)
        if not taken:
            shutil.rmtree(tmp_path / "new")
        taken.append(lock)
        return proxy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filelock.FileLock, "acquire", after_a_removal)
        made = []
        lock = train_llm.lock_directory(tmp_path / "new" / "out", made)
    assert (tmp_path / "new" / "out" / ".lock").exists() and len(taken) == 2
    assert made == [tmp_path / "new" / "out", tmp_path / "new"]
    lock.release()


def test_a_directory_that_cannot_be_made_is_refused(flags, capsys):
    assert "cannot be written to" in refused(flags("/proc/nosuch/out"), capsys)


@pytest.mark.parametrize("name", ["predictions.jsonl", "training_curves.png"])
def test_a_file_of_the_users_own_is_not_overwritten(flags, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert "--overwrite_output_dir" in refused(flags(tmp_path), capsys)
    assert (tmp_path / name).read_text() == "mine"


def flip_a_byte(checkpoint):
    content = bytearray((checkpoint / "optimizer.safetensors").read_bytes())
    content[-100] ^= 1
    (checkpoint / "optimizer.safetensors").write_bytes(content)


def truncate(checkpoint):
    content = (checkpoint / "trainable.safetensors").read_bytes()
    (checkpoint / "trainable.safetensors").write_bytes(content[: len(content) // 2])


def empty_the_manifest(checkpoint):
    (checkpoint / "manifest.json").write_text("")


def edit_the_manifest(checkpoint):
    """The sum of a file is changed with the file, but not the manifest's own."""
    content = bytearray((checkpoint / "optimizer.safetensors").read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[-100] ^= 1
    (checkpoint / "optimizer.safetensors").write_bytes(content)
    text = (checkpoint / "manifest.json").read_text()
    assert before in text
    (checkpoint / "manifest.json").write_text(
        text.replace(before, hashlib.sha256(content).hexdigest())
    )


def drop_a_file(checkpoint):
    (checkpoint / "random.safetensors").unlink()


def sign(checkpoint, **more):
    """Fits the manifest to the files, as one who knows its form can."""
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != "manifest.json")
    files = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names
    } | more
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(
        json.dumps({"files": files, "manifest_sha256": digest})
    )


def name_a_file_outside(checkpoint):
    (checkpoint.parent.parent / "x").write_text("x")
    sign(checkpoint, **{"../../x": hashlib.sha256(b"x").hexdigest()})


def name_an_absolute_file(checkpoint):
    outside = checkpoint.parent.parent / "x"
    outside.write_text("x")
    sign(checkpoint, **{str(outside): hashlib.sha256(b"x").hexdigest()})


def link_a_file(checkpoint):
    outside = (checkpoint / "state.json").rename(checkpoint.parent.parent / "state.json")
    (checkpoint / "state.json").symlink_to(outside)


def change_tensors(checkpoint, change, file="trainable"):
    tensors = load_file(checkpoint / f"{file}.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / f"{file}.safetensors")
    sign(checkpoint)


def put_nan(checkpoint):
    change_tensors(checkpoint, lambda tensors: next(iter(tensors.values())).fill_(math.nan))


def put_nan_into_the_optimizer(checkpoint):
    change_tensors(
        checkpoint, lambda ts: next(t for t in ts.values() if t.ndim).fill_(math.nan), "optimizer"
    )


def add_a_tensor(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.update(stranger=torch.zeros(2)))


def lose_a_tensor(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.pop(min(tensors)))


def misshape_a_tensor(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.update({min(tensors): torch.zeros(3)}))


def lose_a_moment(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.pop(min(tensors)), "optimizer")


def name_a_file_that_no_disk_can_hold(checkpoint):
    sign(checkpoint, **{"n" * 300: "0"})


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant_a_pickle(checkpoint):
    (checkpoint / "trainable.safetensors").write_bytes(
        pickle.dumps(Payload(checkpoint.parent.parent / "executed"))
    )
    sign(checkpoint)


DAMAGES = (
    flip_a_byte, truncate, drop_a_file, empty_the_manifest, edit_the_manifest, name_a_file_outside,
    name_an_absolute_file, link_a_file, put_nan, put_nan_into_the_optimizer, add_a_tensor, lose_a_tensor,
    misshape_a_tensor, lose_a_moment, plant_a_pickle,
    name_a_file_that_no_disk_can_hold,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_warns_of_a_damaged_checkpoint_and_goes_on_from_the_older_one(
    flags, half, half_done, capsys, damage
):
    newest = checkpoints(half)[-1]
    damage(newest)
    capsys.readouterr()
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^WARNING:.*{newest.name}", out, re.M)
    assert re.search(r"^INFO:.*step_00000004 at step 4$", out, re.M)
    assert outcome(half) == half_done[1]
    assert not (half / "executed").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_asked_for_by_path_is_refused_and_nothing_changes(
    flags, half, capsys, damage
):
    newest = checkpoints(half)[-1]
    damage(newest)
    before = snapshot(half)
    assert newest.name in refused(
        [*flags(half, eval_interval=2), "--resume_from", str(newest)], capsys
    )
    assert snapshot(half) == before
    assert not (half / "executed").exists()


def test_a_checkpoint_or_run_directory_by_path_resumes_to_the_same_bits(
    flags, half, half_done, tmp_path
):
    again = Path(shutil.copytree(half, tmp_path / "again"))
    assert run([*flags(half, eval_interval=2), "--resume_from", str(checkpoints(half)[1])]) == 0
    assert outcome(half) == half_done[1]
    assert run([*flags(again, eval_interval=2), "--resume_from", str(again)]) == 0
    assert outcome(again) == half_done[1]


def test_a_run_goes_on_in_fp16_from_a_checkpoint_written_without_a_gradient_scaler(
    flags, half, monkeypatch
):
    monkeypatch.setattr(
        train_llm, "choose_runtime", lambda _: Runtime(torch.device("cpu"), torch.float16)
    )
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert checkpoints(half)[-1].name == "step_00000006"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_rank": 2}, "lora_rank"),
        ({"modification_type": "adapter"}, "modification_type"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"batch_size": 4}, "batch_size"),
        ({"seed": 7}, "seed"),
        ({"eval_fraction": 0.1}, "eval_fraction"),
    ],
)
def test_a_checkpoint_continues_no_other_run(flags, half, capsys, changes, named):
    before = snapshot(half)
    assert f"--{named}" in refused(
        [*flags(half, **({"eval_interval": 2} | changes)), *RESUME], capsys
    )
    assert snapshot(half) == before


def test_a_changed_dataset_is_refused_on_resuming(flags, half, rows, capsys, tmp_path):
    text = json.loads(rows.read_text())
    text[3]["a"] += "!"
    (tmp_path / "changed.json").write_text(json.dumps(text))
    before = snapshot(half)
    argv = flags(half, eval_interval=2, dataset_path=tmp_path / "changed.json")
    assert "dataset" in refused([*argv, *RESUME], capsys)
    assert snapshot(half) == before


def test_another_base_model_is_refused_on_resuming(flags, half, capsys, tmp_path, bytes_tokenizer):
    small_gpt2(seed=1).save_pretrained(tmp_path / "other")
    bytes_tokenizer.save_pretrained(tmp_path / "other")
    before = snapshot(half)
    assert "base model" in refused(
        [*flags(half, model_name_or_path=tmp_path / "other"), *RESUME], capsys
    )
    assert snapshot(half) == before


def test_stale_temporary_directories_are_ignored_and_removed(flags, half, half_done):
    for name in (".new_step_00000009", ".trash_step_00000001", ".old_best", ".new_best"):
        shutil.copytree(half / "best", half / name)
    (half / ".new_step_00000009" / "manifest.json").write_text("{")
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert outcome(half) == half_done[1]
    assert not hidden_leftovers(half)


def test_hidden_directories_of_others_are_left_alone(flags, half, half_done):
    for name in (".old_notes", ".new_ideas", ".trash_talk"):
        (half / name).mkdir()
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert outcome(half) == half_done[1]
    assert hidden_leftovers(half) == {".old_notes", ".new_ideas", ".trash_talk"}


@pytest.mark.parametrize(("changes", "taken"), [({}, "best"), ({"from_scratch": "true"}, "base")])
def test_a_directory_that_would_be_replaced_is_not_taken_for_empty(
    flags, tmp_path, capsys, changes, taken
):
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "precious").write_text("mine")
    before = snapshot(tmp_path)
    assert "holds a run" in refused(flags(tmp_path, **changes), capsys)
    if taken == "base":
        assert "holds a run" in refused(["--demo", f"--output_dir={tmp_path}"], capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("lost", [False, True], ids=["another seed", "no checkpoint, another size"])
def test_a_base_from_scratch_is_the_one_that_the_result_was_trained_on(
    flags, tmp_path, small_base, lost
):
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
    }
    sizes |= {
        "model_name_or_path": None,
        "from_scratch": "true",
        "vocab_size": 257,
        "tokenizer_name_or_path": small_base,
    }
    assert run(flags(tmp_path, max_steps=1, **sizes)) == 0
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "final")
    changes = {"hidden_size": 48} if lost else {"seed": 3}
    assert run([*flags(tmp_path, max_steps=1, **sizes | changes), *RESUME]) == 0
    model = modify_llm.load_trained(tmp_path / "final")
    assert model.config.n_embd == (48 if lost else 24)


def test_a_run_is_not_continued_in_a_directory_around_it_that_holds_another(
    flags, tmp_path, capsys
):
    for directory in (tmp_path, tmp_path / "inner"):
        assert run(flags(directory, max_steps=1)) == 0
    argv = [*flags(tmp_path), "--resume_from", str(tmp_path / "inner")]
    assert "holds a run" in refused(argv, capsys)


@pytest.mark.parametrize(
    "used", ["adapter_path", "model_name_or_path", "dataset_path", "eval_dataset_path"]
)
def test_overwriting_never_removes_what_the_new_run_needs(flags, rows, tmp_path, capsys, used):
    assert run(flags(tmp_path, modification_type="full", max_steps=1)) == 0
    shutil.copy(rows, tmp_path / "best" / "rows.json")
    path = tmp_path / "best" / ("rows.json" if "dataset" in used else "")
    before = snapshot(tmp_path)
    changes = {"model_name_or_path": None, used: path} if used == "adapter_path" else {used: path}
    assert "--overwrite_output_dir: would remove" in refused(
        flags(tmp_path, overwrite_output_dir="true", **changes), capsys
    )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "changes", [{"text_format": "{q}{a}||{a}", "prompt": "no object"}, {"prompt": "a" * 128}]
)
def test_a_prompt_that_cannot_be_put_is_told_before_the_training(flags, tmp_path, capsys, changes):
    argv = flags(tmp_path / "out", **changes)
    assert "--prompt" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_bad_evaluation_file_is_told_by_its_own_flag(flags, tmp_path, capsys):
    assert "--eval_dataset_path absent.json" in refused(
        flags(tmp_path, eval_dataset_path="absent.json"), capsys
    )


def test_a_run_is_not_continued_in_a_directory_that_holds_another(flags, half, tmp_path, capsys):
    assert run(flags(tmp_path / "other", max_steps=1)) == 0
    before = snapshot(tmp_path)
    for start in (half, checkpoints(half)[0]):
        argv = [*flags(tmp_path / "other", eval_interval=2), "--resume_from", str(start)]
        assert "holds a run" in refused(argv, capsys)
    assert snapshot(tmp_path) == before


def test_a_finished_run_resumes_to_exit_0_and_changes_nothing(finished, flags):
    directory = finished[0]
    argv = flags(
        directory, max_steps=None, epochs=2, num_samples=2, max_new_tokens=5, log_interval=2
    )
    before = snapshot(directory)
    assert run([*argv, *RESUME]) == 0
    assert snapshot(directory) == before


def test_a_run_whose_final_is_damaged_is_not_finished(flags, tmp_path):
    argv = flags(tmp_path, max_steps=2)
    assert run(argv) == 0
    expected = saved(tmp_path / "final")
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(b"")
    assert run([*argv, *RESUME]) == 0
    assert saved(tmp_path / "final") == expected


def test_an_output_directory_that_holds_a_run_is_refused_and_overwritten_only_when_asked(
    flags, half, capsys
):
    (half / "notes.txt").write_text("mine")
    before = snapshot(half)
    assert "--overwrite_output_dir" in refused(flags(half), capsys)
    assert snapshot(half) == before
    assert run([*flags(half, max_steps=1), "--overwrite_output_dir"]) == 0
    assert [path.name for path in checkpoints(half)] == ["step_00000001"]
    assert [row["step"] for row in metrics(half)] == [0, 1, 1]
    assert len(list(half.glob("training_*.log"))) == 1
    assert (half / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_target_modules": "nothing"},
        {"modification_type": "selective", "freeze_layers": "9"},
        {"max_length": 500},
        {"model_name_or_path": "EMPTY", "tokenizer_name_or_path": "gpt2"},
        {"dataset_path": "absent.json"},
        {"report_to": "tensorboard"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_overwriting_destroys_nothing_when_the_new_run_cannot_start(
    flags, half, tmp_path, capsys, monkeypatch, changes
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    (tmp_path / "empty").mkdir()
    changes = {
        key: str(tmp_path / "empty") if value == "EMPTY" else value
        for key, value in changes.items()
    }
    before = snapshot(half)
    refused([*flags(half, **changes), "--overwrite_output_dir"], capsys)
    assert snapshot(half) == before


def test_overwriting_the_run_that_the_new_one_starts_from_loses_neither(flags, half, capsys):
    before = snapshot(half)
    argv = flags(half, adapter_path=half / "best", max_steps=1)
    if run([*argv, "--overwrite_output_dir"]) == 0:
        assert (half / "final" / "adapter_model.safetensors").exists()
    else:
        assert snapshot(half) == before


def test_a_second_run_in_the_same_directory_is_refused(flags, half, capsys, monkeypatch):
    acquire = filelock.FileLock.acquire
    before = snapshot(half)
    with filelock.FileLock(
        half / ".lock"
    ):  # the wait of some seconds is for a lock whose owner has just died
        monkeypatch.setattr(
            filelock.FileLock, "acquire", lambda self, *_, **__: acquire(self, timeout=0.1)
        )
        assert "another run" in refused([*flags(half, eval_interval=2), *RESUME], capsys)
        assert "another run" in refused([*flags(half), "--overwrite_output_dir"], capsys)
        assert "another run" in refused(
            ["--demo", "--output_dir", str(half), "--overwrite_output_dir"], capsys
        )
    assert snapshot(half) == before


def test_a_run_that_came_and_went_while_another_waited_is_not_written_over(
    flags, tmp_path, capsys, monkeypatch
):
    acquire = filelock.FileLock.acquire

    def finish_another_run_first(self, *args, **kwargs):
        monkeypatch.undo()
        assert run(flags(tmp_path, max_steps=1)) == 0
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", finish_another_run_first)
    assert "holds a run" in refused(flags(tmp_path), capsys)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]


def test_a_lock_file_without_an_owner_stops_nobody(flags, tmp_path):
    (tmp_path / ".lock").touch()
    assert run(flags(tmp_path, max_steps=1)) == 0


# ---- killed at any moment --------------------------------------------------------------------------------------------

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def main_with_hooks(
    argv, output_dir, journal=os.devnull, die_at=0, signals=(), file_limit=None, environment=()
):
    """train_llm.main in a process of its own: it writes down each change that it is about to make to the output
    directory, kills itself right before the die_at-th, sends itself signals, (micro-step of training, or -micro-step of evaluation,
    signal), and can write no file beyond the limit."""
    os.environ.update(environment)
    book, changes, steps = (
        os.open(journal, os.O_WRONLY | os.O_CREAT),
        itertools.count(1),
        itertools.count(1),
    )
    forward, evaluations = SummedLoss.forward, itertools.count(1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    def watch(event, details):
        if event in CHANGES and str(details[0]).startswith(output_dir):
            if event == "open" and not (
                isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                return
            if next(changes) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(book, f"{event} {details[0]} {details[1]}\n".encode())

    def counted(self, *args, **kwargs):
        number = next(steps) if self.training else -next(evaluations)
        for at, by in signals:
            if at == number:
                time.sleep(0.2)  # later than what `timeout` sends twice
                os.kill(os.getpid(), by)
        return forward(self, *args, **kwargs)

    sys.addaudithook(watch)
    Figure.savefig = lambda self, path, **_: Path(path).write_bytes(b"drawn")
    SummedLoss.forward = counted
    try:
        return train_llm.main(argv)
    except KeyboardInterrupt:
        return 130


def serve():
    """Runs each list of requests on stdin, arguments of main_with_hooks, side by side in forks of this process, which
    has everything imported and nothing at work; answers with exit statuses, negative for signals that killed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            children.append(os.fork())
            if not children[-1]:
                os._exit(main_with_hooks(**request))
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), file=answers, flush=True)


@pytest.fixture(scope="module")
def in_new_processes(tmp_path_factory):
    """Runs requests, arguments of main_with_hooks, in new processes that may die: (exit statuses, stderr)."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    errors = tmp_path_factory.mktemp("server") / "stderr"
    with (
        errors.open("w") as stderr,
        subprocess.Popen([sys.executable, __file__], **pipes, stderr=stderr) as server,
    ):

        def ask(*requests):
            said = errors.stat().st_size
            print(json.dumps(requests, default=str), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline()), errors.read_bytes()[said:].decode()

        yield ask
        server.stdin.close()


@pytest.fixture(scope="module")
def in_new_process(in_new_processes):
    """The exit status of one."""
    return lambda argv, output_dir, **more: in_new_processes(
        {"argv": argv, "output_dir": output_dir} | more
    )[0][0]


KEEP_ONE = {"eval_interval": 2, "save_interval": 2, "save_total_limit": 1}


@pytest.fixture(scope="module")
def killed_runs(flags, in_new_process, tmp_path_factory):
    """(what the run comes to that is not killed, {the change that it was killed right before: what it comes to when
    resumed}), with the status and the log of resuming."""
    directory = tmp_path_factory.mktemp("killed")
    whole, resumed = directory / "whole", {}
    assert in_new_process(flags(whole, **KEEP_ONE), whole, journal=directory / "journal") == 0
    journal = (directory / "journal").read_text().splitlines()
    first = next(i for i, line in enumerate(journal) if "checkpoints/step_00000002" in line) + 1
    chosen = {i for i, line in enumerate(journal) if i > first and line.startswith("os.rename")}
    chosen |= set(range(first, len(journal), 12))
    for i in sorted(chosen):
        output_dir = directory / f"killed_{i}"
        argv = flags(output_dir, **KEEP_ONE)
        assert in_new_process(argv, output_dir, die_at=i + 1) == -signal.SIGKILL, journal[i]
        with redirect_stdout(io.StringIO()) as out:
            status = run([*argv, *RESUME])
        leftovers = {
            "leftovers": hidden_leftovers(output_dir),
            "status": status,
            "log": out.getvalue(),
        }
        resumed[f"{i}: {journal[i]}"] = outcome(output_dir) | leftovers
    assert len(resumed) > 10
    return outcome(whole), resumed


def test_a_run_killed_at_any_moment_of_a_save_goes_on_from_a_good_checkpoint(killed_runs):
    expected, resumed = killed_runs
    for moment, found in resumed.items():
        assert (found["status"], found["leftovers"]) == (0, set()), moment
        assert "skipped" not in found["log"], moment
        assert re.search(r"Resumed from \S+ at step [246]\n", found["log"]), moment
        assert [
            key for key in expected if key != "metrics" and found[key] != expected[key]
        ] == [], moment


def test_metrics_of_a_killed_run_have_every_row_once(killed_runs):
    expected, resumed = killed_runs
    for moment, found in resumed.items():
        assert found["metrics"] == expected["metrics"], moment


def test_a_kill_while_a_checkpoint_replaces_itself_leaves_one(
    flags, in_new_process, tmp_path, capsys
):
    """A stop in a step that ends with a checkpoint anyway writes it twice; in between it must not be gone."""
    settings, stop = KEEP_ONE | {"eval_fraction": 0}, [(8, signal.SIGTERM)]
    argv = flags(tmp_path / "probe", **settings)
    assert (
        in_new_process(argv, tmp_path / "probe", journal=tmp_path / "journal", signals=stop) == 143
    )
    journal = (tmp_path / "journal").read_text().splitlines()
    moves = [
        i
        for i, line in enumerate(journal)
        if line.startswith("os.rename") and "step_00000004" in line
    ]
    for i in moves[1:]:
        output_dir = tmp_path / f"killed_{i}"
        argv = flags(output_dir, **settings)
        assert in_new_process(argv, output_dir, die_at=i + 1, signals=stop) == -signal.SIGKILL
        capsys.readouterr()
        assert run([*argv, *RESUME]) == 0
        assert re.search(r"Resumed from \S+ at step 4\n", capsys.readouterr().out), journal[i]


def test_a_second_sigint_leaves_at_once_with_the_older_checkpoint_good(
    flags, in_new_process, tmp_path
):
    argv = flags(tmp_path, **KEEP_ONE)
    assert in_new_process(argv, tmp_path, signals=[(5, signal.SIGINT), (6, signal.SIGINT)]) == 130
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]
    assert run([*argv, *RESUME]) == 0


def test_a_killed_run_with_workers_frees_its_lock(flags, in_new_process, tmp_path):
    argv = flags(tmp_path, **KEEP_ONE, num_workers=1)
    assert in_new_process(argv, tmp_path, signals=[(6, signal.SIGKILL)]) == -signal.SIGKILL
    assert run([*argv, *RESUME]) == 0


# ---- signals, disks, other programs --------------------------------------------------------------


def started(argv, directory, **options):
    """The script in a process group of its own, once its third step is logged."""
    command = [sys.executable, str(ROOT / "train_llm.py"), *argv]
    log, environment = directory / "screen", os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True, **options
        )
    while "| Step    3/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    return process, log


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(flags, tmp_path, number):
    argv, by = (
        flags(tmp_path / "out", epochs=9, num_workers=2, max_steps=0),
        getattr(signal, number),
    )
    process, log = started(argv, tmp_path)
    os.killpg(process.pid, by)  # its workers too
    assert process.wait(60) == 128 + by, log.read_text()
    assert f"Stopped by {number} at step" in log.read_text()
    assert "error" not in log.read_text()
    assert run([*argv, *RESUME, "--max_steps=0"]) == 0


def test_timeout_sends_its_signal_twice_and_the_checkpoint_is_written(flags, tmp_path):
    process, log = started(flags(tmp_path / "out", max_steps=500), tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143, log.read_text()
    assert "Stopped by SIGTERM" in log.read_text()


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(flags, tmp_path):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process, log = started(flags(tmp_path / "out", max_steps=30), tmp_path, preexec_fn=nohup)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(60) == 0, log.read_text()


def test_asked_twice_in_another_program_it_raises_instead_of_ending_the_process(flags, tmp_path):
    def twice(_loss):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    with in_micro_step(3, twice), pytest.raises(KeyboardInterrupt):
        run(flags(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_training_works_in_a_thread(flags, tmp_path):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(run(flags(tmp_path, max_steps=2))))
    thread.start()
    thread.join(120)
    assert statuses == [0]


def test_the_caller_gets_logging_streams_and_handlers_back(flags, tmp_path, monkeypatch):
    transformers_logging.enable_progress_bar()  # whatever earlier tests have left
    root, handler = logging.getLogger(), logging.NullHandler()
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(root, "level", logging.ERROR)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    handlers = [signal.getsignal(number) for number in train_llm.STOP_SIGNALS]
    assert run(flags(tmp_path, max_steps=1)) == 0
    assert root.handlers == [handler] and root.level == logging.ERROR
    assert sys.stdout is stream and stream.errors == "strict"
    assert [signal.getsignal(number) for number in train_llm.STOP_SIGNALS] == handlers
    assert transformers_logging.is_progress_bar_enabled()


def test_a_terminal_that_lacks_a_character_shows_it_escaped_and_no_emoji(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert train_llm.for_terminal("🔧 Using device: é ж") == r"Using device: é \u0436"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert train_llm.for_terminal("🔧 ж") == "🔧 ж"


@pytest.mark.parametrize("failure", ["samples", "best"])
def test_the_checkpoint_of_an_evaluation_is_there_before_samples_and_best(
    failure, flags, tmp_path, monkeypatch, capsys
):
    write_model = train_llm.write_model

    def fails(run, name="samples"):
        assert checkpoints(tmp_path)[-1].name == f"step_{run.progress.step:08d}"
        failing() if name != "final" else write_model(run, name)

    monkeypatch.setattr(train_llm, "show_samples" if failure == "samples" else "write_model", fails)
    assert run(flags(tmp_path, eval_interval=3)) == 0
    said = capsys.readouterr().out
    assert len(re.findall(rf"^WARNING:.*{failure}: no such luck; the run goes on", said, re.M)) == 2
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
    assert ("best" in said.partition("Written to")[2]) == (failure == "samples")


@pytest.mark.parametrize("technique", ["full", "selective"])
def test_a_whole_model_is_saved_though_its_base_has_vanished(
    technique, flags, tmp_path, small_base, capsys
):
    """And what is frozen is written as it was read, not as bf16 has rounded it."""
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    start = load_file(base / "model.safetensors")
    argv = flags(
        tmp_path / "out", modification_type=technique, model_name_or_path=base, num_samples=1,
        freeze_layers="0" if technique == "selective" else None, precision="auto",
    )  # fmt: skip
    with in_micro_step(3, lambda _: shutil.rmtree(base)):
        assert run(argv) == 0
    assert "predictions.jsonl: " in capsys.readouterr().out  # the base's own answers
    saved_weights = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert saved_weights.keys() == start.keys()
    frozen = [name for name in start if ".h.0." in name]
    assert all(
        torch.equal(saved_weights[n], start[n]) == (technique == "selective") for n in frozen
    )


def test_a_best_model_that_a_kill_left_out_is_written_on_resuming(flags, tmp_path):
    assert run(flags(tmp_path / "whole", eval_interval=3)) == 0
    argv = flags(tmp_path / "cut", eval_interval=3)

    class Killed(BaseException):
        pass

    def killed(run):
        if run.progress.step == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_llm, "keep_best", killed)
        run(argv)
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step_00000003"]
    assert not (tmp_path / "cut" / "best").exists()
    # Where no later evaluation is better, nothing else would write it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_llm, "train", lambda _: None)
        assert run([*argv, *RESUME]) == 0
    assert (tmp_path / "cut" / "best" / "adapter_model.safetensors").exists()
    shutil.rmtree(tmp_path / "cut" / "final")
    assert run([*argv, *RESUME]) == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def no_rename_of_directories(path, target):
    if Path(path).is_dir() and not Path(path).name.startswith(".new_"):
        raise OSError(errno.EXDEV, "Invalid cross-device link")  # as overlayfs on an image's layer
    os.rename(path, target)
    return Path(target)


def test_a_directory_that_cannot_be_renamed_is_replaced_all_the_same(flags, tmp_path, monkeypatch):
    assert run(flags(tmp_path / "plain", eval_interval=1, save_total_limit=1)) == 0
    monkeypatch.setattr(Path, "rename", no_rename_of_directories)
    assert run(flags(tmp_path / "layer", eval_interval=1, save_total_limit=1)) == 0
    assert outcome(tmp_path / "layer") == outcome(tmp_path / "plain")
    assert not hidden_leftovers(tmp_path / "layer")


def test_checkpoints_may_lie_on_another_disk(flags, tmp_path):
    """Staged beside what they replace: never renamed from one directory into the other."""
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "out" / "checkpoints").symlink_to(tmp_path / "disk")
    rename = Path.rename

    def same_disk(path, target):
        assert Path(path).parent.resolve() == Path(target).parent.resolve()
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", same_disk)
        argv = flags(tmp_path / "out", save_interval=1, save_total_limit=1)
        assert run([*argv, "--resume_from=auto"]) == 0
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step_00000006"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_a_warning(code, flags, tmp_path, capsys, monkeypatch):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(flags(tmp_path, max_steps=1)) == 0
    assert re.search(
        r"^WARNING:.*not synced, its file system cannot", capsys.readouterr().out, re.M
    )


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(code, flags, tmp_path, capsys, monkeypatch):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    assert run(flags(tmp_path, max_steps=1)) == 0
    assert re.search(r"^WARNING:.*no locks: see that no second run", capsys.readouterr().out, re.M)


def test_a_lock_that_is_held_elsewhere_names_the_file_to_remove(
    flags, tmp_path, capsys, monkeypatch
):
    def held(*_, **__):
        raise filelock.Timeout(str(tmp_path / ".lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", held)
    assert f"remove {tmp_path / '.lock'}" in refused(flags(tmp_path), capsys)


def test_of_two_starts_with_auto_the_second_goes_on_from_what_the_first_wrote(flags, tmp_path):
    """The second has prepared while the first was at work: it looks at the directory only once it
    is its own."""
    argv = [*flags(tmp_path / "out", max_steps=4), *RESUME]
    first, second = script(argv), script(argv)
    said = [process.communicate(timeout=120) for process in (first, second)]
    statuses = [process.returncode for process in (first, second)]
    assert statuses == [0, 0] or sorted(statuses) == [0, 2], said
    assert [row["step"] for row in metrics(tmp_path / "out") if "loss" in row] == [1, 2, 3, 4]


def test_a_refused_start_leaves_no_directory(flags, tmp_path, capsys):
    out = tmp_path / "some" / "where"
    refused(flags(out, eval_fraction=0.999), capsys)
    assert not (tmp_path / "some").exists()


# 8 rows a step, as 8, 2 x 4, 4 x 2 and 1 x 8.
SPLITS = [(8, 1), (2, 4), (4, 2), (1, 8)]


def test_a_run_goes_on_in_any_split_of_the_same_steps(flags, tmp_path):
    settings = {"max_steps": 8, "save_interval": 2, "eval_interval": 4}
    argv = [
        flags(tmp_path / "split", **settings, batch_size=size, gradient_accumulation_steps=steps)
        for size, steps in SPLITS
    ]
    assert (
        run(flags(tmp_path / "whole", **settings, batch_size=8, gradient_accumulation_steps=1)) == 0
    )
    for number, argv_of_split in enumerate(argv):
        parts = SPLITS[number][1]
        more = [] if number == 0 else RESUME
        if number < len(argv) - 1:
            with stopped_in(2 * parts):  # in the second step of its turn
                assert run([*argv_of_split, *more]) == 143
        else:
            assert run([*argv_of_split, *more]) == 0
    whole, split = metrics(tmp_path / "whole"), metrics(tmp_path / "split")
    assert [row["step"] for row in split] == [row["step"] for row in whole]
    for one, other in zip(whole, split, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_what_may_change_in_a_run_that_goes_on_is_said(flags, tmp_path, capsys):
    argv = {"max_steps": 4, "save_interval": 2, "early_stopping_patience": 1}
    assert run(flags(tmp_path, **argv)) == 0
    changed = argv | {
        "max_steps": 6, "max_eval_samples": 1, "early_stopping_patience": 3,
        "gradient_checkpointing": "true",
    }  # fmt: skip
    capsys.readouterr()
    assert run([*flags(tmp_path, **changed), *RESUME]) == 0
    said = capsys.readouterr().out
    assert "The run grows from 4 to 6 steps: from here on with the learning rates" in said
    assert "Other held-out rows from here on" in said
    for bad, told in (
        ({"max_steps": 5}, "was to take 6 steps, not 5"),
        ({"lora_rank": 2}, "rank 4"),
    ):
        error = refused([*flags(tmp_path, **changed | bad), *RESUME], capsys)
        assert told in error and "another --output_dir, without --resume_from" in error


def test_a_longer_run_keeps_its_warm_up(flags, tmp_path):
    assert run(flags(tmp_path, max_steps=20, num_samples=0)) == 0
    assert run([*flags(tmp_path, max_steps=60, num_samples=0), *RESUME]) == 0
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["warmup_steps"] == 2


def test_max_samples_limits_the_held_out_share_too(flags, tmp_path):
    argv = {"max_steps": 1, "max_samples": 8, "eval_fraction": 0.2}
    for name, limit, held_out in (("a", None, 2), ("b", 3, 3)):
        assert run(flags(tmp_path / name, **argv, max_eval_samples=limit)) == 0
        log = next((tmp_path / name).glob("training_*.log")).read_text()
        assert f"8 to train on, {held_out} held out" in log


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"early_stopping_patience": 2, "eval_fraction": 0}, "--early_stopping_patience: needs"),
        ({"min_lr": 0.1, "learning_rate": 0.01}, "--min_lr 0.1: above --learning_rate 0.01"),
        ({"temperature": 1e-20}, "--temperature"),
        ({"temperature": 1e9}, "--temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told, flags, tmp_path, capsys):
    assert told in refused(flags(tmp_path, **settings), capsys)


# ---- answers ------------------------------------------------------------------------------------


def test_the_bases_generation_config_does_not_touch_the_answers(flags, tmp_path, small_base):
    base, answers = tmp_path / "base", []
    shutil.copytree(small_base, base)
    settings = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    settings |= {"repetition_penalty": 9.0, "min_new_tokens": 3, "suppress_tokens": [1, 2, 3]}
    for config in ({}, settings):
        (base / "generation_config.json").write_text(json.dumps(config))
        argv = flags(tmp_path / f"out{len(config)}", model_name_or_path=base, num_samples=2)
        assert run(argv) == 0
        answers.append((tmp_path / f"out{len(config)}" / "predictions.jsonl").read_text())
    assert answers[0] == answers[1]


def test_equal_prompts_at_a_temperature_get_different_answers_and_the_same_again(finished, capsys):
    asked = [f"--adapter_path={finished[0] / 'final'}", "--temperature=1", "--max_new_tokens=20"]
    asked += ["--prompt=a", "--prompt=a", "--device=cpu", "--precision=fp32"]
    answers = []
    for _ in range(2):
        assert run(asked) == 0
        answers.append(re.findall(r"^Answer: (.*)", capsys.readouterr().out, re.M))
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_an_answers_indentation_stays_and_half_a_character_goes(finished, monkeypatch, capsys):
    asked = [f"--adapter_path={finished[0] / 'final'}", "--prompt=a", "--device=cpu"]
    said = [("\n    return x\n", True), (" Paris", True)]
    monkeypatch.setattr(train_llm, "generate_answers", lambda *_: said)
    assert run([*asked, "--prompt=b"]) == 0
    assert "Answer:     return x\n" in (out := capsys.readouterr().out)
    assert "Answer: Paris\n" in out


def answer_settings(**changes):
    return argparse.Namespace(**train_llm.DEFAULTS | {"max_new_tokens": 12} | changes)


PROMPTS = [[65, 66, 67], [70] * 30, [80, 81], list(range(65, 82)), [90] * 117]  # 128 positions


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_answers_in_a_batch_are_those_that_transformers_gives_to_each_prompt_alone(
    technique, bytes_tokenizer
):
    model, expected = technique_model(technique, small_gpt2(initializer_range=0.5)).eval(), []
    room = model.config.n_positions - train_llm.prefix_length(model)
    settings = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
    for prompt in PROMPTS:
        limit = {"max_new_tokens": min(12, room - len(prompt))}
        ids = model.generate(torch.tensor([prompt]), **settings, **limit)[0, len(prompt) :].tolist()
        cut = ids[: ids.index(EOS)] if EOS in ids else ids
        expected.append((bytes_tokenizer.decode(cut).removesuffix("\ufffd"), EOS in ids))
    args = answer_settings(repetition_penalty=1.0)
    assert train_llm.generate_answers(PROMPTS, model, bytes_tokenizer, args, CPU) == expected


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"repetition_penalty": 1.3}, {"num_beams": 3, "length_penalty": 0.5}],
)
def test_an_answer_does_not_depend_on_those_beside_it(settings, bytes_tokenizer):
    model, state = technique_model("prefix").eval(), torch.get_rng_state()
    args = answer_settings(**settings)
    with train_llm.attention_without_mask(model):  # as samples are drawn in training
        together = train_llm.generate_answers(PROMPTS, model, bytes_tokenizer, args, CPU)
    for number, prompt in enumerate(PROMPTS):
        args.seed = train_llm.DEFAULTS["seed"] + number
        alone = train_llm.generate_answers([prompt], model, bytes_tokenizer, args, CPU)
        assert alone == [together[number]]
    assert torch.equal(torch.get_rng_state(), state)


def test_ends_of_text_in_a_batch_of_one_length_are_not_called_padding(bytes_tokenizer, monkeypatch):
    model, warned = small_gpt2(pad_token_id=EOS), []
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "warning_once", warned.append)
    prompts = [[65, EOS], [66, EOS]]
    train_llm.generate_answers(prompts, model, bytes_tokenizer, answer_settings(), CPU)
    assert not warned and model.config.pad_token_id == EOS


def test_the_repetition_penalty_knows_no_offset_of_the_logits(bytes_tokenizer):
    """Real GPT-2's logits lie around -100: each repeated token would be banned."""
    model, answers = small_gpt2(initializer_range=0.5), []
    for offset in (0.0, -100.0):
        head = model.lm_head.forward
        model.lm_head.forward = lambda hidden, head=head, offset=offset: head(hidden) + offset
        answers += train_llm.generate_answers(
            PROMPTS[:2], model, bytes_tokenizer, answer_settings(), CPU
        )
    assert answers[:2] == answers[2:]


def test_noise_draws_tokens_by_their_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    drawn = train_llm.drawn_by_row(logits, [generator] * len(logits)).argmax(1)
    assert drawn.bincount() / 4000 == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_a_conversation_is_read_whole_in_the_format_of_turns_and_ctrl_c_ends_an_answer(
    monkeypatch, capsys, bytes_tokenizer
):
    typed, asked = ["Ctrl-C", "one", "two", "three"], []

    def answer(prompts, _model, _tokenizer, _args, _runtime, streamer):
        asked.append(bytes_tokenizer.decode(prompts[0]))
        streamer.on_finalized_text(f" answer {len(asked)}")
        if len(asked) == 1:
            raise KeyboardInterrupt

    def typing(_):
        if not typed:
            raise EOFError
        if typed[0] == "Ctrl-C":
            del typed[0]
            raise KeyboardInterrupt
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(train_llm, "generate_answers", answer)
    model = small_gpt2(n_positions=312)
    args = answer_settings(text_format="messages", max_new_tokens=100)
    train_llm.chat(args, CPU, model, bytes_tokenizer)
    turns = {"messages": [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "two"},
    ]}  # fmt: skip
    expected = data_pipeline.encode_prompt(turns, "messages", bytes_tokenizer)
    assert asked[1] == bytes_tokenizer.decode(expected)
    # 100 tokens stay free for the answer: the oldest turns make room
    assert "three" in asked[2] and "answer 1" not in asked[2]
    assert "answer 3" in capsys.readouterr().out


def test_the_scores_of_an_evaluations_answers_are_sacrebleus(flags, tmp_path, capsys):
    sacrebleu = pytest.importorskip("sacrebleu")
    argv = flags(tmp_path, num_samples=4, eval_answers=4, eval_interval=3, max_new_tokens=5)
    assert run(argv) == 0
    text = (tmp_path / "predictions.jsonl").read_text()
    predictions = [json.loads(line) for line in text.splitlines()]
    answers = [row["tuned"] for row in predictions]
    references = [[row["reference"] for row in predictions]]
    scored = [row for row in metrics(tmp_path) if "eval_chrf" in row]
    assert [row["step"] for row in scored] == [3, 6]
    assert scored[-1] == {
        "step": 6, "epoch": 0, "eval_chrf": sacrebleu.corpus_chrf(answers, references).score,
        "eval_bleu": sacrebleu.corpus_bleu(answers, references).score,
        "eval_stopped": sum(row["stopped"] for row in predictions) / 4,
        "eval_answer_length": sum(len(text.encode()) for text in answers) / 4,
        "eval_reference_length": sum(len(text) for text in references[0]) / 4,
    }  # fmt: skip
    line = f"Held-out answers: chrF {scored[-1]['eval_chrf']:.1f}, BLEU"
    assert line in (tmp_path / "final" / "README.md").read_text()
    assert capsys.readouterr().out.count(line) >= 2  # at the evaluation, and at the end
    again = flags(tmp_path, eval_answers=4, max_new_tokens=5, adapter_path=tmp_path / "final")
    assert run([*again, "--eval_only"]) == 0
    assert line in capsys.readouterr().out


def test_eval_answers_without_sacrebleu_are_refused(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    find_spec = train_llm.importlib.util.find_spec
    monkeypatch.setattr(
        train_llm.importlib.util, "find_spec", lambda n: None if n == "sacrebleu" else find_spec(n)
    )
    said = refused(flags(tmp_path / "out", eval_answers=2), capsys)
    assert "--eval_answers" in said and "pip install sacrebleu" in said


# ---- failures at run time --------------------------------------------------------------------------------------------


def nan_loss(loss):
    return loss * math.nan


def infinite_gradient(loss):
    loss.register_hook(lambda gradient: gradient * math.inf)


def out_of_memory(loss):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def out_of_memory_on_a_cpu(loss):
    torch.empty(2**50)


NO_MEMORY = (out_of_memory, out_of_memory_on_a_cpu)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (nan_loss, "loss is nan"),
        (infinite_gradient, "norm"),
        *((fault, "--batch_size") for fault in NO_MEMORY),
    ],
)
def test_a_fault_in_a_step_ends_in_one_line_with_earlier_checkpoints_intact(
    flags, tmp_path, capsys, fault, said
):
    argv = flags(tmp_path, save_interval=2)
    with in_micro_step(6, fault):
        assert said in refused(argv, capsys, status=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]
    assert not (tmp_path / "final").exists()
    assert run([*argv, *RESUME]) == 0
    assert all(math.isfinite(loss) for loss in training_losses(tmp_path))


def test_a_held_out_loss_that_is_nan_ends_the_run_before_it_can_become_the_best(
    flags, tmp_path, capsys
):
    with in_micro_step(5, nan_loss, training=False):
        assert "held-out loss is nan" in refused(flags(tmp_path, eval_interval=2), capsys, status=1)
    assert not (tmp_path / "best").exists()


def test_a_dead_worker_ends_the_run_in_one_line(flags, tmp_path, capsys):
    def kill_workers(_):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    argv = flags(
        tmp_path,
        num_workers=1,
        max_steps=None,
        epochs=1,
        batch_size=1,
        save_interval=1,
        eval_fraction=0,
    )
    with in_micro_step(4, kill_workers):
        refused(argv, capsys, status=1)
    assert checkpoints(tmp_path)
    assert run([*argv, *RESUME]) == 0


def test_a_dead_worker_is_named_by_the_signal_that_comes_after_what_it_breaks(
    flags, tmp_path, capsys
):
    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def reset(_):
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    before = signal.signal(signal.SIGALRM, killed)
    try:
        with in_micro_step(1, reset):
            assert "is killed by signal" in refused(flags(tmp_path), capsys, status=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_curve_of_the_learning_rate_is_exact(flags, tmp_path):
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        assert run(flags(tmp_path, max_steps=30, scheduler="linear")) == 0
    curve = drawn[0].axes[2].lines[-1].get_ydata()
    rates = [row["lr"] for row in metrics(tmp_path) if "lr" in row]
    assert list(curve) == pytest.approx(rates, rel=1e-9)


def test_a_full_disk_ends_in_exit_1_with_no_leftovers_and_the_older_checkpoint_good(
    flags, half, half_done, in_new_processes
):
    """A limit on the size of a file stands for the full disk: the log fits, the optimizer's state does not."""
    before = snapshot(half / "checkpoints")
    argv = [*flags(half, eval_interval=2), *RESUME]
    statuses, error = in_new_processes({"argv": argv, "output_dir": half, "file_limit": 20_000})
    assert statuses == [1], error
    assert re.fullmatch(r"train_llm\.py: error: \S.*\n", error)
    assert snapshot(half / "checkpoints") == before
    assert not hidden_leftovers(half)
    assert run(argv) == 0
    assert outcome(half) == half_done[1]


def test_a_disk_that_is_full_from_the_start_is_no_fault_of_the_input(
    flags, tmp_path, in_new_processes
):
    statuses, error = in_new_processes(
        {"argv": flags(tmp_path), "output_dir": tmp_path, "file_limit": 1000}
    )
    assert (
        statuses == [1] and "Traceback" not in error
    )  # which is written to a file, under the limit too
    assert run([*flags(tmp_path, max_steps=1), *RESUME]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_log_file_on_a_full_disk_adds_no_second_line(flags, tmp_path, capsys):
    def fill_the_disk(_):
        (log,) = (h for h in logging.getLogger().handlers if isinstance(h, train_llm.LogHandler))
        os.dup2(os.open("/dev/full", os.O_WRONLY), log.file.fileno())
        logging.getLogger().info("what no disk holds")
        log.file.write("nor this")
        raise OSError(28, "No space left on device")

    with in_micro_step(3, fill_the_disk):
        assert "No space left" in refused(flags(tmp_path), capsys, status=1)


def test_a_closed_stdout_does_not_end_the_run(flags, tmp_path):
    process = script(flags(tmp_path, num_samples=1, max_new_tokens=2))
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(120) == 0, error
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
    assert re.search(
        r"^Epoch 0 \| Step    6/6 ", next(tmp_path.glob("*.log")).read_text(encoding="utf-8"), re.M
    )


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_a_full_disk_below_stdout_does_not_end_the_run(flags, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train_llm.py"),
        *flags(tmp_path, max_steps=1, eval_fraction=0),
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()


def test_control_c_stops_the_script_with_130_and_a_checkpoint(flags, tmp_path):
    process = script(flags(tmp_path, max_steps=5000))
    for line in process.stdout:
        if b"| Step    3/6 " in line:
            process.send_signal(signal.SIGINT)
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == b""
    step = int(re.search(rb"Stopped by SIGINT at step (\d+)", rest)[1])
    assert checkpoints(tmp_path)[-1].name == f"step_{step:08d}"


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD_NUMBERS = {
    "max_length": ["1", "0", "-1", "x", "1.5"], "batch_size": ["0", "-8"], "num_workers": ["-1"],
    "seed": ["-1", "9223372036854775808"], "eval_fraction": ["-0.1", "1", "nan", "inf"], "max_samples": ["-1"],
    "max_eval_samples": ["-1"], "vocab_size": ["0"], "hidden_size": ["0", "10"], "num_attention_heads": ["0"],
    "num_hidden_layers": ["0"], "max_position_embeddings": ["0"], "dropout": ["-0.1", "1", "nan"],
    "lora_rank": ["0", "-4", "nan"], "lora_alpha": ["0", "-1", "nan", "inf"], "lora_dropout": ["1", "-1", "nan"],
    "adapter_size": ["0"], "prefix_length": ["0"], "prefix_projection_size": ["-1", "8"], "epochs": ["0", "-1"],
    "max_steps": ["-1"], "learning_rate": ["0", "-0.1", "nan", "inf"], "weight_decay": ["-0.1", "nan", "inf"],
    "max_grad_norm": ["-1", "nan", "inf"], "gradient_accumulation_steps": ["0", "4294967296"], "warmup_steps": ["-1"],
    "lora_plus_ratio": ["0", "-1", "nan", "inf"], "length_penalty": ["-101", "nan", "inf"],
    "label_smoothing": ["-0.1", "1", "nan"], "adam_beta1": ["-0.1", "1", "nan"], "adam_beta2": ["-0.1", "1", "nan"],
    "adam_epsilon": ["0", "-1", "nan", "inf"], "min_lr": ["-1", "nan", "inf"], "log_interval": ["0"], "eval_interval": ["-1"], "save_interval": ["-1"],
    "save_total_limit": ["0"], "early_stopping_patience": ["-1"], "max_new_tokens": ["0"],
    "temperature": ["-1", "nan", "inf"], "num_samples": ["-1"], "top_p": ["0", "1.1"],
    "repetition_penalty": ["0.9", "nan"], "num_beams": ["0"], "no_repeat_ngram_size": ["-1"], "eval_answers": ["-1"],
}  # fmt: skip


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*_, **__):
        pytest.fail("something was loaded before the flags were checked")

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", load)
    monkeypatch.setattr(GPT2LMHeadModel, "__init__", load)
    monkeypatch.setattr("builtins.open", load)


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in BAD_NUMBERS.items() for value in values]
)
def test_a_number_out_of_range_is_refused_before_anything_loads(
    flags, tmp_path, capsys, nothing_loads, flag, value
):
    assert f"--{flag}" in refused([*flags(tmp_path / "out"), f"--{flag}={value}"], capsys)
    assert not (tmp_path / "out").exists()


def test_every_numeric_flag_is_among_those():
    without_default = {"learning_rate", "warmup_steps"}
    numbers = {n for n, d in train_llm.DEFAULTS.items() if type(d) in (int, float)}
    assert numbers | without_default == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    "machine, device, dtype",
    [
        ({"cuda": True, "bf16": True}, "cuda:0", torch.bfloat16),
        ({"cuda": True, "bf16": False}, "cuda:0", torch.float16),  # a T4, whose bf16 is emulated
        ({"mps": True}, "mps", torch.float32),
        ({"cpu": {"avx512_bf16": True}}, "cpu", torch.bfloat16),
        ({"cpu": {"avx2": True}}, "cpu", torch.float32),
    ],
)
def test_auto_takes_the_best_device_and_no_emulated_precision(machine, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in machine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        including_emulation or machine["bf16"]
    ))  # fmt: skip
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: machine.get("cpu", {}))
    runtime = train_llm.choose_runtime(train_llm.resolve({"dataset_path": "-"}))
    assert (str(runtime.device), runtime.dtype) == (device, dtype)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (["--learning", "1"], "--learning"),
        (["--from_scratch", "maybe"], "--from_scratch"),
        (["--scheduler", "stairs"], "--scheduler"),
        (["--modification_type", "magic"], "--modification_type"),
        (["--freeze_layers", "a"], "--freeze_layers"),
        (["--resume_from", "auto", "--overwrite_output_dir"], "--overwrite_output_dir"),
        (
            ["--gradient_checkpointing", "--modification_type=prefix", "--prefix_type=key_value"],
            "--gradient_check",
        ),
        (["--precision", "fp16"], "--precision fp16"),
        (["--demo", "--resume_from", "auto"], "--resume_from"),
        (["--adapter_path", "absent", "--from_scratch"], "--from_scratch"),
        (["--output_dir="], "--output_dir"),
        (["--adapter_path="], "--adapter_path"),
        (["--resume_from="], "--resume_from"),
        (["--model_name_or_path="], "--model_name_or_path"),
        (["--tokenizer_name_or_path="], "--tokenizer_name_or_path"),
        (["--eval_dataset_path="], "--eval_dataset_path"),
        (["--demo", "--adapter_path", "absent"], "--adapter_path"),
        (["--prompt", "byte \udcff"], "--prompt"),
        (["--text_format", "byte \udcff||{a}"], "--text_format"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, tmp_path, capsys, nothing_loads, bad, said):
    assert said in refused([*flags(tmp_path / "out"), *bad], capsys)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"adapter_size": 8},
            "--adapter_size: without effect, it belongs to --modification_type adapter",
        ),
        ({"num_hidden_layers": 3}, "--num_hidden_layers: without effect without --from_scratch"),
        (
            {"modification_type": "full", "trainable_modules": "wte"},
            "--trainable_modules: without effect",
        ),
        ({"scheduler": "cosine", "warmup_steps": 2}, "--warmup_steps: without effect"),
        ({"scheduler": "constant", "min_lr": 1e-6}, "--min_lr: without effect"),
        ({"eval_only": "true", "max_steps": 2}, "--max_steps: without effect, nothing is trained"),
        (
            {"dataset_path": None, "prompt": "x", "learning_rate": 1},
            "--learning_rate: without effect",
        ),
        (
            {"dataset_path": None, "prompt": "x", "modification_type": "full"},
            "--modification_type: without effect",
        ),
    ],
)
def test_a_flag_without_effect_is_pointed_out(flags, tmp_path, capsys, given, said):
    run(flags(tmp_path / "out", **{"max_steps": 1} | given))
    assert f"WARNING:train_llm:{said}" in capsys.readouterr().out


def test_eval_fraction_beside_a_file_of_held_out_rows_is_pointed_out(flags, tmp_path, rows, capsys):
    run(flags(tmp_path, eval_dataset_path=rows, eval_fraction=0.5, max_steps=1))
    assert "--eval_fraction: without effect" in capsys.readouterr().out


def test_the_demo_points_out_flags_that_it_does_not_look_at(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_llm, "demo", lambda *_: None)
    run(
        [
            "--demo",
            "--epochs=9",
            "--learning_rate=1",
            f"--output_dir={tmp_path}",
            "--seed=1",
            "--precision=fp32",
        ]
    )
    said = re.findall("--(.*): without effect", capsys.readouterr().out)
    assert sorted(said) == ["epochs", "learning_rate"]


def test_flags_that_have_an_effect_are_not_pointed_out(flags, tmp_path, capsys):
    run(
        flags(
            tmp_path / "out", max_steps=1, lora_rank=2, lora_target_modules="c_attn", warmup_steps=1
        )
    )
    assert "without effect" not in capsys.readouterr().out


def test_a_dataset_is_required_to_train(tmp_path, capsys, nothing_loads):
    assert "--dataset_path" in refused(["--output_dir", str(tmp_path / "out")], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_refused(flags, tmp_path, capsys, nothing_loads):
    assert "--device cuda" in refused(flags(tmp_path / "out", device="cuda"), capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_path": "absent.json"}, "absent.json"),
        ({"dataset_path": "EMPTY"}, "rows.json"),
        ({"dataset_path": "UNLABELLED"}, "unlabelled.json"),
        ({"eval_dataset_path": "absent.json"}, "absent.json"),
        ({"eval_dataset_path": "UNLABELLED"}, "--eval_dataset_path"),
        ({"eval_fraction": 0.99}, "--eval_fraction 0.99"),
        ({"resume_from": "absent"}, "--resume_from absent"),
        ({"resume_from": "TMP"}, "no good checkpoint"),
        ({"text_format": "{q}||{absent}"}, "absent"),
        ({"model_name_or_path": "TMP"}, "--model_name_or_path"),
        ({"model_name_or_path": "nobody/nothing"}, "--model_name_or_path nobody/nothing"),
        ({"tokenizer_name_or_path": "nobody/nothing"}, "--tokenizer_name_or_path nobody/nothing"),
        ({"adapter_path": "TMP"}, "modification.json"),
        ({"lora_target_modules": "nothing"}, "c_attn"),
        ({"modification_type": "selective", "freeze_layers": "2"}, "--freeze_layers 2"),
        ({"max_length": 129}, "--max_length 129"),
        (
            {"max_length": 120, "modification_type": "prefix", "prefix_length": 9},
            "--max_length 120",
        ),
        ({"tokenizer_name_or_path": "gpt2"}, "50257"),
        (
            {"from_scratch": "true", "max_position_embeddings": 64, "hidden_size": 24},
            "64 positions",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_one_line_with_nothing_written(
    flags, tmp_path, capsys, changes, said
):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "unlabelled.json").write_text(json.dumps([{"q": "x", "a": ""}]))
    places = {"EMPTY": "rows.json", "UNLABELLED": "unlabelled.json", "TMP": ""}
    changes = {k: tmp_path / places[v] if v in places else v for k, v in changes.items()}
    assert said in refused(flags(tmp_path / "out", **changes), capsys)
    assert not (tmp_path / "out").exists()


def test_an_output_dir_that_is_a_file_is_refused(flags, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    for more in ([], ["--overwrite_output_dir"], RESUME):
        assert "--output_dir" in refused([*flags(tmp_path / "out"), *more], capsys)
        assert "--output_dir" in refused([*flags(tmp_path / "out" / "below"), *more], capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_rows_without_a_label_are_left_out_and_fewer_rows_than_a_batch_train(
    flags, tmp_path, capsys
):
    text = [
        {"q": "x", "a": "y"},
        {"q": "x", "a": ""},
        {"q": "z" * 200, "a": "y"},
        {"q": "", "a": "y"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, text)))
    argv = flags(
        tmp_path / "out",
        dataset_path=tmp_path / "rows.jsonl",
        eval_fraction=0,
        max_steps=None,
        batch_size=8,
    )
    assert run([*argv, "--epochs=2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^INFO:train_llm:2 rows .*left out", out, re.M)
    assert re.search(r"Rows: +2 to train on, 0 held out", out)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2]


def test_a_held_out_file_replaces_the_fraction_and_limits_take_the_first_rows(
    flags, tmp_path, rows, capsys
):
    argv = flags(tmp_path, eval_dataset_path=rows, max_samples=7, max_eval_samples=3, max_steps=1)
    assert run(argv) == 0
    assert re.search(r"Rows: +7 to train on, 3 held out", capsys.readouterr().out)
    first = json.loads(rows.read_text())[:3]
    assert metrics(tmp_path)[0]["eval_tokens"] == sum(len(row["a"]) + 1 for row in first)


def test_a_hub_that_never_answers_ends_in_exit_2_within_seconds(flags, tmp_path, small_base):
    absent = {"model_name_or_path": "nobody/nothing", "tokenizer_name_or_path": small_base}
    asked = {
        "model_name_or_path": absent,
        "tokenizer_name_or_path": {"tokenizer_name_or_path": "nobody/nothing"},
    }
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.settimeout(60)
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub would ask a question of its own first
        }
        environment["HF_HOME"] = str(tmp_path / "home")
        processes = {
            flag: script(flags(tmp_path / "out", **names), **environment)
            for flag, names in asked.items()
        }
        with deaf.accept()[0], deaf.accept()[0]:  # from the first questions on
            start = time.monotonic()
            errors = {
                flag: process.communicate(timeout=120)[1].decode()
                for flag, process in processes.items()
            }
            seconds = time.monotonic() - start
    for flag, error in errors.items():
        assert processes[flag].returncode == 2
        assert re.fullmatch(rf"train_llm\.py: error: --{flag} nobody/nothing: .*\n", error), error
    assert seconds < 15
    assert not (tmp_path / "out").exists()


# ---- using a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(flags, tmp_path_factory):
    """A run that learned four answers by heart, in a text format of its own."""
    directory = tmp_path_factory.mktemp("learned")
    colours = {"grass": "green", "snow": "white", "blood": "red", "sky": "blue"}
    lines = ["question,answer", *[f"{question}, {answer}" for question, answer in colours.items()]]
    (directory / "colours.csv").write_text("\n".join(lines))
    settings = {
        "dataset_path": directory / "colours.csv", "eval_dataset_path": directory / "colours.csv", "max_length": 40,
        "text_format": "Q: {question}\nA:||{answer}", "modification_type": "full", "max_steps": 80, "batch_size": 4,
        "gradient_accumulation_steps": 1, "eval_interval": 80, "num_samples": 4, "max_new_tokens": 20,
    }  # fmt: skip
    assert run(flags(directory / "out", **settings)) == 0
    return directory / "out", colours


def test_a_model_learns_to_answer_and_to_stop_by_itself(learned):
    rows_ = [
        json.loads(line) for line in (learned[0] / "predictions.jsonl").read_text().splitlines()
    ]
    expected = [(f"Q: {question}\nA:", f" {answer}") for question, answer in learned[1].items()]
    assert sorted((row["prompt"], row["tuned"]) for row in rows_) == sorted(expected)
    assert all(row["reference"] == row["tuned"] and row["stopped"] for row in rows_)
    assert not any(row["base"] == row["tuned"] for row in rows_)


def test_prompts_are_answered_in_the_runs_own_format_up_to_the_end_of_text(learned, capsys):
    assert (
        run(["--adapter_path", str(learned[0] / "best"), "--prompt", "grass", "--prompt=sky"]) == 0
    )
    out = capsys.readouterr().out
    assert re.findall(r"^Prompt: (.*)\nAnswer: (.*)$", out, re.M) == [
        ("grass", "green"),
        ("sky", "blue"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("asked.txt", "grass\n\nsky\n", ["grass", "sky"]),
        (
            "asked.jsonl",
            '{"question": "grass"}\n{"question": "sky"}\n',
            [{"question": "grass"}, {"question": "sky"}],
        ),
        ("asked.csv", "question\ngrass\nsky\n", [{"question": "grass"}, {"question": "sky"}]),
    ],
)
def test_a_file_of_prompts_is_answered_in_its_order_beside_it(
    name, content, prompts, learned, tmp_path
):
    (tmp_path / name).write_text(content)
    argv = ["--adapter_path", str(learned[0] / "best"), "--prompts_file", str(tmp_path / name)]
    assert run(argv) == 0
    rows_ = [json.loads(line) for line in (tmp_path / "asked.answers.jsonl").open()]
    assert rows_ == [
        {"prompt": prompt, "answer": answer, "stopped": True}
        for prompt, answer in zip(prompts, ["green", "blue"], strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xe9", "can't decode byte"),
        ("a.jsonl", b'{"q": "a"}\nnull\n', "row 2: None is neither a text nor fields"),
        ("a.jsonl", b'{"q": "a"}\n5\n', "row 2: 5 is neither a text nor fields"),
        ("a.jsonl", b'{"q": "\\ud83d"}\n', "row 1 holds"),
        ("a.csv", b"q\na,b\n", "row 1: more fields than the header"),
        ("a.csv", b"q\ncaf\xe9\n", "row 1 holds"),
        ("a.jsonl", b'{"q": \n', "invalid JSON"),
        ("a.jsonl.gz", b"plain", "Not a gzipped file"),
        ("a.txt", b"\n", "holds no prompts"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_refused_by_its_name(
    name, content, said, learned, tmp_path, capsys
):
    (tmp_path / name).write_bytes(content)
    argv = ["--adapter_path", str(learned[0] / "best"), "--prompts_file", str(tmp_path / name)]
    error = refused(argv, capsys)
    assert f"--prompts_file {tmp_path / name}: " in error and said in error


def test_a_prompt_in_a_file_ends_at_the_lines_end_alone(learned, tmp_path):
    (tmp_path / "asked.txt").write_text("one\u2028still one\nanother\n", encoding="utf-8")
    settings = Namespace(prompt=[], prompts_file=str(tmp_path / "asked.txt"))
    assert train_llm.read_prompts(settings) == ["one\u2028still one", "another"]


def test_fields_that_are_no_turns_are_not_asked_as_an_empty_question():
    with pytest.raises(ValueError, match="neither 'messages' nor 'conversations'"):
        train_llm.prompt_fields({"prompt": "What?"}, "messages")
    turns = train_llm.prompt_fields('{"a": 1}', "messages")["messages"]
    assert turns == [{"role": "user", "content": '{"a": 1}'}]  # typed in a chat


def test_a_signal_ends_the_answers_after_training_at_once(flags, tmp_path, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the handler of the host program comes first

    monkeypatch.setattr(train_llm, "answer_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(flags(tmp_path, max_steps=1))
    assert (tmp_path / "final").exists()


@pytest.mark.parametrize(("text", "read"), [("Hello", ["Hello"]), ("[a, b]", ["a", "b"])])
def test_a_configured_prompt_is_one_text_or_a_list(tmp_path, text, read):
    (tmp_path / "c.yaml").write_text(f"prompt: {text}\n")
    assert train_llm.read_config(tmp_path / "c.yaml")["prompt"] == read
    (tmp_path / "c.yaml").write_text("prompt: [1]\n")
    with pytest.raises(ValueError, match="prompt"):
        train_llm.read_config(tmp_path / "c.yaml")


def test_an_answer_that_is_cut_off_is_marked(learned, capsys):
    argv = [
        "--adapter_path",
        str(learned[0] / "best"),
        "--prompt",
        "grass",
        "--max_new_tokens",
        "4",
    ]
    assert run(argv) == 0
    assert re.search(r"^Answer: gre \[\.\.\.\]$", capsys.readouterr().out, re.M)


def test_a_seed_fixes_what_a_temperature_draws(learned, capsys):
    argv = [
        "--adapter_path",
        str(learned[0] / "best"),
        "--prompt",
        "Who?",
        "--temperature=1.5",
        "--max_new_tokens=30",
    ]
    answers = []
    for seed in ("1", "1", "2"):
        assert run([*argv, "--seed", seed]) == 0
        answers.append(re.search(r"^Answer: .*", capsys.readouterr().out, re.M | re.S)[0])
    assert answers[0] == answers[1] != answers[2]


def test_a_run_with_prompts_answers_them_when_it_is_trained(flags, tmp_path, capsys):
    assert run(flags(tmp_path, max_steps=1, prompt=["one", "two"], max_new_tokens=2)) == 0
    assert re.findall(r"^Prompt: (.*)$", capsys.readouterr().out, re.M) == ["one", "two"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("x" * 300, "positions"), ('{"answer": "only"}', "reads ['question']; 'question' is missing")],
)
def test_a_prompt_that_cannot_be_answered_is_refused(learned, capsys, prompt, said):
    assert said in refused(["--adapter_path", str(learned[0] / "best"), "--prompt", prompt], capsys)


@pytest.mark.parametrize(
    ("text", "text_format", "read"),
    [
        ("Hi", "output", "Hi"),
        ("Hi", "alpaca", data_pipeline.PROMPT_WITHOUT_INPUT.format(instruction="Hi")),
        (
            '{"instruction": "Add", "input": "1, 2"}',
            "alpaca",
            data_pipeline.PROMPT_WITH_INPUT.format(instruction="Add", input="1, 2"),
        ),
        ("Hi", "Q: {question}\nA:||{answer}", "Q: Hi\nA:"),
        ("{Hi}", "Q: {question}\nA:||{answer}", "Q: {Hi}\nA:"),
        ("Hi", "Q: {input}\nA:||{answer}", "Q: Hi\nA:"),
        ('{"q": "Hi"}', "Q: {q} {input}\nA:||{answer}", "Q: Hi \nA:"),
        ('{"q": "Hi", "input": null}', "Q: {q} {input}\nA:||{answer}", "Q: Hi \nA:"),
        ("Hi", "messages", data_pipeline.PROMPT_WITHOUT_INPUT.format(instruction="Hi")),
        (
            '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}',
            "messages",
            "S\n\n### Instruction:\nQ\n\n### Response:",
        ),
    ],
)
def test_a_prompt_is_read_in_the_format_of_the_run(tokenizer, text, text_format, read):
    ids = train_llm.prompt_ids(text, tiny_gpt2(), tokenizer, text_format)
    assert tokenizer.decode(ids) == read


def test_the_end_of_text_inside_a_prompt_is_text_as_in_training(small_base):
    tokenizer = data_pipeline.load_tokenizer(str(small_base))
    ids = train_llm.prompt_ids("a<|endoftext|>b", small_gpt2(), tokenizer, "output")
    assert EOS not in ids and bytes(ids) != b"" and len(ids) == len("a<|endoftext|>b")


def test_a_model_whose_vocabulary_is_too_small_for_the_prompt_is_refused(capsys):
    sizes = [
        "--hidden_size=16",
        "--num_attention_heads=2",
        "--num_hidden_layers=1",
        "--vocab_size=100",
    ]
    assert "embeddings for 100" in refused(
        ["--from_scratch", *sizes, "--prompt=hello", "--device=cpu"], capsys
    )


def test_a_finished_run_still_answers_a_prompt(flags, finished, capsys):
    before = snapshot(finished[0])
    argv = flags(
        finished[0], max_steps=None, epochs=2, num_samples=2, max_new_tokens=5, log_interval=2
    )
    assert run([*argv, *RESUME, "--prompt", "a"]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "Answer: " in out and snapshot(finished[0]) == before


@pytest.mark.parametrize("name", ["demo", "output_dir", "model_name_or_path", "epochs"])
def test_what_a_directory_was_trained_with_sets_no_other_flag(
    flags, finished, small_base, tmp_path, name
):
    shutil.copytree(finished[0] / "final", tmp_path / "final")
    (tmp_path / "final" / "manifest.json").unlink()
    settings = modify_llm.read_json(tmp_path / "final" / "modification.json")
    modify_llm.write_json(tmp_path / "final" / "modification.json", settings | {name: 7})
    args = train_llm.resolve({"adapter_path": str(tmp_path / "final"), "prompt": ["a"]})
    default = None if name == "model_name_or_path" else train_llm.DEFAULTS[name]
    assert getattr(args, name) == default


def test_a_result_made_of_links_loads_as_the_hubs_cache_is(finished, tmp_path):
    for file in (finished[0] / "final").iterdir():
        (tmp_path / file.name).symlink_to(file)
    base = modify_llm.load_trained(finished[0] / "final").base_name
    assert modify_llm.load_trained(tmp_path, base).modification["modification_type"] == "lora"


def test_a_lora_that_peft_made_is_used_with_its_bases_tokenizer_and_its_own_rank(
    flags, tmp_path, small_base, capsys
):
    base = GPT2LMHeadModel.from_pretrained(small_base)
    made = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    made.save_pretrained(tmp_path / "peft")
    assert (
        run(
            [
                "--adapter_path",
                str(tmp_path / "peft"),
                "--text_format=output",
                "--prompt=ab",
                "--precision=fp32",
            ]
        )
        == 0
    )
    assert "Answer: " in capsys.readouterr().out
    argv = flags(
        tmp_path / "out", adapter_path=tmp_path / "peft", model_name_or_path=None, max_steps=1
    )
    assert run(argv) == 0, (
        capsys.readouterr().err
    )  # GPT-2's 50,257 tokens would not fit this model's 257
    assert modify_llm.read_json(tmp_path / "out" / "run.json")["settings"]["lora_rank"] == 3
    assert "trained with 3" in refused([*argv, "--lora_rank=5", "--overwrite_output_dir"], capsys)


def test_a_base_from_scratch_is_saved_beside_the_result_and_both_can_move(
    flags, tmp_path, small_base, rows, capsys
):
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
    }
    argv = flags(
        tmp_path / "out", model_name_or_path=None, from_scratch="true", vocab_size=257, max_steps=3, **sizes,
        tokenizer_name_or_path=small_base,
    )  # fmt: skip
    assert run(argv) == 0
    assert capsys.readouterr().out.count("RANDOM WEIGHTS") == 1
    (tmp_path / "out").rename(tmp_path / "moved")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "moved" / "base")
    assert (base.config.n_embd, base.config.n_layer, base.config.vocab_size) == (24, 1, 257)
    model = modify_llm.load_trained(tmp_path / "moved" / "final")
    tokenizer = data_pipeline.load_tokenizer(str(tmp_path / "moved" / "final"))
    dataset = data_pipeline.load_dataset(rows, tokenizer, text_format=FORMAT, max_length=96)
    held_out, losses = dataset.split(0.2, 42)[1], held_out_losses(tmp_path / "moved")
    assert plain_loss(model, held_out)[0] == pytest.approx(losses[3], rel=1e-6)
    assert plain_loss(base, held_out)[0] == pytest.approx(losses[0], rel=1e-6)


# ---- several processes -----------------------------------------------------------------------------------------------

TWO_BY_FOUR = {
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 8,
    "eval_interval": 2,
}
# The script, but rank 1 dies before its sixth step.
MORTAL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_llm
open(os.path.join({directory!r}, "pid_" + os.environ["RANK"]), "w").write(str(os.getpid()))
train_step = train_llm.train_step
def step(run, *rest):
    if os.environ["RANK"] == "1" and run.progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run, *rest)
train_llm.train_step = step
sys.exit(train_llm.main())
"""
IN_PARTS = """
import sys
sys.path.insert(0, {root!r})
import train_llm
train_llm.CPU_TOKENS = 30  # each process takes its rows in some number of parts
sys.exit(train_llm.main())
"""


def torchrun(program, argv):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(program),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *argv], capture_output=True, text=True, timeout=150, env=environment
    )


@pytest.fixture(scope="module")
def two_processes(flags, tmp_path_factory):
    """(output directory, and how it went) of two ranks: one is killed, then both finish the run, in parts."""
    directory = tmp_path_factory.mktemp("two")
    output_dir, program, start = directory / "out", directory / "mortal.py", time.monotonic()
    program.write_text(MORTAL.format(root=str(ROOT), directory=str(directory)))
    killed = torchrun(program, flags(output_dir, **TWO_BY_FOUR))
    seconds, kept = time.monotonic() - start, [path.name for path in checkpoints(output_dir)]
    pids = [int((directory / f"pid_{rank}").read_text()) for rank in (0, 1)]
    program.write_text(IN_PARTS.format(root=str(ROOT)))
    finished = torchrun(program, [*flags(output_dir, **TWO_BY_FOUR), *RESUME])
    return output_dir, {
        "killed": killed,
        "seconds": seconds,
        "kept": kept,
        "pids": pids,
        "finished": finished,
    }


def test_torchrun_leaves_within_a_minute_when_a_rank_is_killed(two_processes):
    told = two_processes[1]
    assert told["killed"].returncode != 0
    assert told["seconds"] < 60
    assert told["kept"] == ["step_00000002", "step_00000004"]
    for pid in told["pids"]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_torchrun_with_two_times_four_rows_has_the_losses_of_one_process_with_eight(
    two_processes, flags, tmp_path
):
    output_dir, told = two_processes
    assert told["finished"].returncode == 0, told["finished"].stderr
    assert "at step 4\n" in told["finished"].stdout  # resumed
    assert run(flags(tmp_path, **(TWO_BY_FOUR | {"batch_size": 8}))) == 0
    alone, together = metrics(tmp_path), metrics(output_dir)
    assert len(alone) == len(together) == 8 + 5
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_other_rows_a_step_are_refused_and_another_split_of_the_same_goes_on(
    two_processes, flags, tmp_path, capsys
):
    output_dir = tmp_path / "out"
    shutil.copytree(two_processes[0], output_dir)
    before = snapshot(output_dir)
    told = refused([*flags(output_dir, **TWO_BY_FOUR), *RESUME], capsys)
    assert "took 8 rows a step" in told and "not 4" in told and "another --output_dir" in told
    assert snapshot(output_dir) == before
    split = TWO_BY_FOUR | {"batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 10}
    assert run([*flags(output_dir, **split), *RESUME]) == 0
    said = capsys.readouterr().out
    assert "By 1 processes from here on, not 2" in said
    assert "The run grows from 8 to 10 steps" in said
    assert [row["step"] for row in metrics(output_dir) if "loss" in row] == list(range(1, 11))


def two_ranks(in_new_processes, *requests):
    """Two processes that train together: (exit statuses, stderr)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    asked = [{"environment": rank} | request for rank, request in zip(ranks, requests, strict=True)]
    return in_new_processes(*asked)


def test_processes_that_start_on_different_states_are_refused_by_rank(
    flags, in_new_processes, two_processes, tmp_path
):
    shutil.copytree(two_processes[0] / "checkpoints", tmp_path / "shared" / "checkpoints")
    ranks = [
        {"argv": [*flags(path, **TWO_BY_FOUR), *RESUME], "output_dir": path}
        for path in (tmp_path / "shared", tmp_path / "elsewhere")  # a disk that is not shared
    ]
    statuses, error = two_ranks(in_new_processes, *ranks)
    assert statuses == [2, 2], error
    assert "process 1: step is 0, that of process 0 8; all need the same files" in error
    ranks = [
        {"argv": flags(tmp_path / "new", **TWO_BY_FOUR, seed=seed), "output_dir": tmp_path}
        for seed in (1, 2)
    ]
    statuses, error = two_ranks(in_new_processes, *ranks)
    assert statuses == [2, 2], error
    assert "process 1: --seed is 2, that of process 0 1" in error


@pytest.mark.parametrize(("status", "waits"), [(0, True), (143, True), (1, False), (2, False)])
def test_after_an_error_a_process_leaves_without_waiting_for_the_others(status, waits, monkeypatch):
    """What only NCCL shows: to leave the group in order may itself wait for the other processes."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("waits"))
    monkeypatch.setattr(os, "_exit", lambda code: calls.append(code) or sys.exit(code))
    try:
        train_llm.leave_group(status)
    except SystemExit as leaving:
        assert leaving.code == status
    assert calls == (["waits"] if waits else [status])


def test_a_rank_that_raises_ends_all_at_once(flags, tmp_path):
    program, start = tmp_path / "raises.py", time.monotonic()
    program.write_text(
        MORTAL.format(root=str(ROOT), directory=str(tmp_path)).replace(
            "os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('no luck')"
        )
    )
    done = torchrun(program, flags(tmp_path / "out", **TWO_BY_FOUR))
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    assert "train_llm.py: error: process 1: no luck\n" in done.stderr
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid_{rank}").read_text()), 0)


def test_two_processes_train_on_one_row(flags, in_new_processes, tmp_path, rows):
    argv = flags(tmp_path, max_samples=1, eval_dataset_path=rows, max_eval_samples=1, max_steps=2)
    asked = {"argv": argv, "output_dir": tmp_path}
    statuses, error = two_ranks(in_new_processes, asked, asked)
    assert statuses == [0, 0], error
    assert (
        run(
            flags(
                tmp_path / "alone",
                max_samples=1,
                eval_dataset_path=rows,
                max_eval_samples=1,
                max_steps=2,
            )
        )
        == 0
    )
    assert training_losses(tmp_path) == pytest.approx(training_losses(tmp_path / "alone"), rel=1e-5)


def test_when_one_rank_is_told_to_stop_all_stop_in_that_step_and_resume_to_the_same_bits(
    flags, in_new_processes, tmp_path
):
    def both(output_dir, *more, signals=()):
        argv = [*flags(output_dir, **TWO_BY_FOUR, lora_dropout=0.1, dropout=0.1), *more]
        told = {"argv": argv, "output_dir": output_dir}
        return two_ranks(in_new_processes, told, told | {"signals": signals})

    assert both(tmp_path / "whole")[0] == [0, 0]
    statuses, error = both(tmp_path / "stopped", signals=[(3, signal.SIGTERM)])
    assert statuses == [143, 143], error
    step = checkpoints(tmp_path / "stopped")[-1].name
    assert step in ("step_00000003", "step_00000004")
    assert both(tmp_path / "stopped", *RESUME)[0] == [0, 0]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_ranks_that_are_told_to_stop_in_an_evaluation_save_before_it_ends(
    flags, in_new_processes, tmp_path
):
    argv = flags(tmp_path / "out", **TWO_BY_FOUR | {"eval_interval": 4, "batch_size": 1})
    told = {"argv": argv, "output_dir": tmp_path / "out"}
    statuses, error = two_ranks(
        in_new_processes, told, told | {"signals": [(-4, signal.SIGTERM)]}
    )  # in the first batch of the second evaluation
    assert statuses == [143, 143], error
    assert checkpoints(tmp_path / "out")[-1].name == "step_00000004"
    assert held_out_losses(tmp_path / "out").keys() == {0}


# ---- machines that are not here --------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize(
    ("says", "status", "told"),
    [
        ("Tesla T4, 525.60.13", 0, "Tesla T4, driver 525.60.13: this PyTorch is built "),
        ("NVIDIA-SMI has failed", 9, "nvidia-smi says: NVIDIA-SMI has failed"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_told_with_its_driver(
    says, status, told, flags, tmp_path, capsys, monkeypatch
):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    argv = flags(tmp_path / "out", max_steps=1, eval_fraction=0, device="auto")
    assert run(argv) == 0
    assert (
        f"WARNING:train_llm:Training on the cpu, not on the GPU: {told}" in capsys.readouterr().out
    )
    assert told in refused(flags(tmp_path / "out2", device="cuda"), capsys)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert run([*argv, "--overwrite_output_dir"]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_more_processes_than_gpus_and_several_on_a_mac_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"--device cuda: 2 GPUs here; .*--nproc_per_node=2"):
        train_llm.choose_device("auto", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"--device mps: .*--device cpu"):
        train_llm.choose_device("auto", 2)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "tokens", "hint"),
    [
        (8, 1, 60, "480 tokens a micro-batch leave a GPU waiting; try --batch_size 128"),
        (4, 32, 250, "1,000 tokens a micro-batch leave a GPU waiting; try --batch_size 16"),
        (8, 1, 500, None),
    ],
)
def test_a_gpu_that_would_wait_for_launches_gets_a_batch_size_to_try(
    batch_size, accumulation, tokens, hint
):
    args = Namespace(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    found = train_llm.batch_size_hint(args, tokens)
    assert found == {} if hint is None else found["Hint"].startswith(hint)


def test_an_fp16_step_that_overflows_is_left_out_and_null_in_the_metrics(
    flags, tmp_path, monkeypatch
):
    """With the scaler of fp16 in use on a CPU: its arithmetic is the same."""
    monkeypatch.setattr(train_llm.Runtime, "fp16", True)
    with in_micro_step(4, infinite_gradient):  # in the second step
        assert run(flags(tmp_path, max_steps=4)) == 0
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in text and "NaN" not in text
    norms = [row["grad_norm"] for row in metrics(tmp_path) if "loss" in row]
    assert [norm is None for norm in norms] == [False, True, False, False]
    state = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())
    assert state["grad_scaler"]["scale"] == 2**15  # halved once
    steps = saved(checkpoints(tmp_path)[-1])
    taken = {v[2] for k, v in steps.items() if k.endswith(".step")}
    assert taken == {torch.tensor(3.0).numpy().tobytes()}  # AdamW's own count, of four


def test_the_demo_under_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--demo" in refused(["--demo", "--output_dir", str(tmp_path / "out")], capsys)


# ---- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_takes_one_thread_and_gives_the_others_back(tmp_path, monkeypatch):
    threads, before = [], torch.get_num_threads()

    def stand_in(args, _runtime):
        threads.append(torch.get_num_threads())
        Path(args.output_dir, "best").mkdir(parents=True, exist_ok=True)

    for name in ("train_model", "show_demo_answers"):
        monkeypatch.setattr(train_llm, name, stand_in)
    try:
        torch.set_num_threads(2)
        assert train_llm.main(["--demo", f"--output_dir={tmp_path / 'demo'}"]) == 0
        assert (threads, torch.get_num_threads()) == ([1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_the_demo_removes_no_file_that_it_did_not_write(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_llm, "train_model", interrupted)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "training_notes.log").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        run(["--demo", "--output_dir", str(tmp_path)])
    assert (tmp_path / "tensorboard").exists() and (tmp_path / "training_notes.log").exists()


def test_the_demo_does_not_overwrite_another_run(half, capsys):
    before = snapshot(half)
    with in_micro_step(1, out_of_memory), in_micro_step(1, out_of_memory, training=False):
        assert "--output_dir" in refused(["--demo", "--output_dir", str(half)], capsys)
    assert snapshot(half) == before


def test_the_demo_answers_held_out_questions_that_its_base_cannot(tmp_path):
    process = script(["--demo", "--output_dir", str(tmp_path / "demo")])
    out, error = process.communicate(timeout=400)
    out = out.decode()
    assert process.returncode == 0, error.decode()
    count, base, tuned = map(int, re.search(r"of (\d+): base (\d+), tuned (\d+)", out).groups())
    assert count == 80 and base < 0.4 * count and tuned >= 0.8 * count, (base, tuned)
    closing = out.split("Held-out questions")[1]
    assert len(re.findall(r"^\w+, \w+, \w+: \w+ .+$", closing, re.M)) == 5
    assert out.count("Written to ") == out.count("Try it: ") == 1  # the first part's is temporary
    assert """--prompt '{"input": "...", "instruction": "..."}'""" in out
    losses = held_out_losses(tmp_path / "demo")
    assert losses[max(losses)] < losses[0]
    assert (tmp_path / "demo" / "base" / "model.safetensors").exists()
    log = next((tmp_path / "demo").glob("training_*.log")).read_text(encoding="utf-8")
    assert len(re.findall(r"Using device", log)) == 1
    assert not hidden_leftovers(tmp_path / "demo")


def test_the_demos_files_are_what_their_script_writes_and_share_no_list():
    data, lists = ROOT / "tests" / "data", []
    files = runpy.run_path(str(data / "make_tasks.py"))["files"]()
    for name, text in files.items():
        assert (data / name).read_text(encoding="utf-8") == text
        lists += [row["input"] for row in json.loads(text)]
    assert len(lists) == len(set(lists)) == 3280


if __name__ == "__main__":
    serve()
