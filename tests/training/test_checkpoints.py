"""Rotation keeps the newest and the best checkpoint, and early stopping ends a run that gains no more.

python -m pytest tests/training/test_checkpoints.py
"""

import json
import re
from pathlib import Path

import pytest
from runs import RESUME, checkpoints, failing, held_out_losses, run, saved, snapshot

import train_llm


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
    unlink = Path.unlink

    def held(path, **missing):
        if path.name == "step_00000002":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, **missing)

    monkeypatch.setattr(Path, "unlink", held)
    assert run(flags(tmp_path, save_interval=1, save_total_limit=1, eval_fraction=0)) == 0
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000006"]
    assert re.search(
        r"^WARNING:.*step_00000002 cannot be removed: .*denied", capsys.readouterr().out, re.M
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
    ("losses", "told", "best"),
    [
        ([5.0, 5.5, 5.6], "is above that before the first step", None),
        ([5.0, 4.0, 5.1, 5.2], "is above that before the first step", 4.0),
        ([5.0, 4.0, 4.1, 4.2, 4.3], "has not fallen for two evaluations", 4.0),
        ([5.0, 4.0, 4.1, 3.9], None, 3.9),
    ],
)
def test_a_held_out_loss_that_gets_worse_is_told_once_with_what_to_try(
    losses, told, best, flags, tmp_path, monkeypatch, capsys
):
    """best/ is spoken of where it is better than the untouched base, and where it is not, the end says so."""
    given = iter(losses)
    monkeypatch.setattr(train_llm, "evaluate", lambda *_: (next(given), 10, 0.5))
    assert run(flags(tmp_path, max_steps=len(losses) - 1, eval_interval=1)) == 0
    out = capsys.readouterr().out
    lines = re.findall(r"WARNING:train_llm:The held-out loss (.*)", out)
    assert [line.split(":")[0] for line in lines[:1]] == ([told] if told else [])
    assert all("--learning_rate" in line for line in lines)
    assert all(("best/ holds the best so far" in line) == bool(best) for line in lines)
    assert ("No evaluation was better than that before the first step" in out) == (not best)


def test_few_held_out_tokens_and_a_full_rate_on_an_adapter_are_told(flags, tmp_path, capsys):
    assert run(flags(tmp_path / "a", max_steps=1)) == 0
    assert re.search(r"WARNING:\S+:\d+ tokens are held out: a perpl", capsys.readouterr().out)
    assert run(flags(tmp_path / "b", max_steps=1, adapter_path=tmp_path / "a")) == 0  # its best/
    out = capsys.readouterr().out
    assert f"--learning_rate 0.01 at first loses part of what {tmp_path / 'a' / 'best'}" in out


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
