"""What the tests of train_llm.py share: a small model with a token a byte, 26 rows, and finished runs."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import new_processes
import pytest
from runs import (
    FORMAT,
    TECHNIQUES,
    checkpoints,
    outcome,
    quick_figures,
    run,
    script,
    small_gpt2,
    stopped_in,
)
from tokenizers import pre_tokenizers
from transformers import GPT2LMHeadModel, GPT2Tokenizer

import data_pipeline


@pytest.fixture(scope="session")
def bytes_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = GPT2Tokenizer(
        vocab={c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, merges=[]
    )
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return tokenizer


@pytest.fixture(scope="session")
def small_base(tmp_path_factory, bytes_tokenizer):
    """Two layers, hidden size 32, and a token a byte, as a local directory."""
    directory = tmp_path_factory.mktemp("small_base")
    small_gpt2().save_pretrained(directory)
    bytes_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
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
def figures_are_quick():
    with quick_figures():
        yield


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def batch(rows, bytes_tokenizer):
    """Eight rows of 2 to 70 tokens."""
    kinds = {
        "text_format": FORMAT,
        "max_length": 96,
        "num_workers": 0,
        "tokenizer": bytes_tokenizer,
    }
    return next(iter(data_pipeline.final_dataset_loader(rows, padding="longest", **kinds)))


@pytest.fixture(scope="session")
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
        with quick_figures():
            assert run(flags(directory / name, **settings)) == 0
    return directory


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def half_done(flags, tmp_path_factory):
    """(a run of 6 steps, stopped after the 5th with checkpoints at 2, 4 and 5; what it would have come to)."""
    directory = tmp_path_factory.mktemp("half_done")
    with quick_figures(), stopped_in(9):
        assert run(flags(directory / "stopped", eval_interval=2)) == 143
    assert [path.name[-1] for path in checkpoints(directory / "stopped")] == ["2", "4", "5"]
    with quick_figures():
        assert run(flags(directory / "whole", eval_interval=2)) == 0
    return directory / "stopped", outcome(directory / "whole")


@pytest.fixture
def half(half_done, tmp_path):
    """A copy of the half-done run, to damage."""
    return Path(shutil.copytree(half_done[0], tmp_path / "out"))


@pytest.fixture(scope="session")
def in_new_processes(tmp_path_factory):
    """Runs requests, arguments of main_with_hooks, in new processes that may die: (exit statuses, stderr)."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    errors = tmp_path_factory.mktemp("server") / "stderr"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, new_processes.__file__], **pipes, stderr=stderr, start_new_session=True
        ) as server,
    ):

        def ask(*requests):
            said = errors.stat().st_size
            print(json.dumps(requests, default=str), file=server.stdin, flush=True)
            if not select.select([server.stdout], [], [], 180)[0]:
                os.killpg(server.pid, signal.SIGKILL)
            answer = server.stdout.readline()
            assert answer, f"no answer within three minutes: {errors.read_text()}"
            return json.loads(answer), errors.read_bytes()[said:].decode()

        yield ask
        server.stdin.close()


@pytest.fixture(scope="session")
def in_new_process(in_new_processes):
    """The exit status of one."""
    return lambda argv, output_dir, **more: in_new_processes(
        {"argv": argv, "output_dir": output_dir} | more
    )[0][0]


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*_, **__):
        pytest.fail("something was loaded before the flags were checked")

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", load)
    monkeypatch.setattr(GPT2LMHeadModel, "__init__", load)
    monkeypatch.setattr("builtins.open", load)
