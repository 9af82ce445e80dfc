"""The demo trains a model that answers held-out questions its base cannot, and touches no file of others.

python -m pytest tests/training/test_demo.py
"""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from runs import (
    ROOT,
    TORCHRUN,
    held_out_losses,
    hidden_leftovers,
    in_micro_step,
    out_of_memory,
    refused,
    run,
    script,
    snapshot,
)

import train_llm


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


def test_the_demo_under_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    for name, value in zip(TORCHRUN, ("2", "0", "0", "29500", "127.0.0.1"), strict=True):
        monkeypatch.setenv(name, value)
    assert "--demo" in refused(["--demo", "--output_dir", str(tmp_path / "out")], capsys)


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
