"""Short runs in this process or one of their own, how to stop them, and what they leave behind."""

import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tiny import tiny_gpt2

import modify_llm
import train_llm
from train_llm import Runtime, SummedLoss

ROOT = Path(train_llm.__file__).parent
RESUME = ("--resume_from", "auto")
EOS = 256  # of the byte tokenizer: 256 bytes and the end of text
FORMAT = "{q}||{a}"
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")  # what it hands over
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


def small_gpt2(seed=0, **overrides):
    settings = {"vocab_size": 257, "eos_token_id": EOS, "bos_token_id": EOS} | overrides
    with torch.no_grad():
        return tiny_gpt2(seed, **settings)


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
    """{file and tensor: (type, shape, bytes)} of all tensors in a checkpoint, or that lie in a directory."""
    files = [directory] if directory.is_file() else sorted(directory.glob("*" + suffix))
    return {
        f"{file.name}: {name}": (str(tensor.dtype), tensor.shape, tensor.numpy().tobytes())
        for file in files
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
def quick_figures():
    """Drawing would take longer than training; one run, through the script itself, draws its curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn"))
        yield


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


def first_gradients(output_dir):
    """The gradients of a run of a single step, as AdamW saw them: its first moment is a tenth of them."""
    tensors = load_file(checkpoints(output_dir)[-1])
    return {
        k.removeprefix("exp_avg."): 10 * v for k, v in tensors.items() if k.startswith("exp_avg.")
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


def logged_rates(output_dir):
    return [row["lr"] for row in metrics(output_dir) if "lr" in row]


def failing(*_, **__):
    raise OSError("no such luck")


def infinite_gradient(loss):
    loss.register_hook(lambda gradient: gradient * math.inf)


def out_of_memory(loss):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
