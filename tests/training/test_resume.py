"""A run that was stopped anywhere goes on to the same bits, in any split of the same steps and wherever
it was moved to.

    python -m pytest tests/training/test_resume.py
"""

import gc
import itertools
import json
import os
import re
import shutil
import signal
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from runs import (
    CPU,
    FORMAT,
    RESUME,
    checkpoints,
    held_out_losses,
    hidden_leftovers,
    metrics,
    outcome,
    refused,
    run,
    saved,
    small_gpt2,
    snapshot,
    stopped_in,
)
from safetensors.torch import load_file

import data_pipeline
import modify_llm
import train_llm
from train_llm import Runtime, SummedLoss, evaluate


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
    tensors = load_file(checkpoints(tmp_path)[-1])
    assert {float(t) for name, t in tensors.items() if name.startswith("step.")} == {2.0}
    assert snapshot(source) == before


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
            told = refused([*argv, "--resume_from", str(path)], capsys)
            assert f"--resume_from {path}: no such directory" in told


def test_held_out_rows_that_are_trained_on_too_are_counted(flags, tmp_path, capsys, rows):
    argv = flags(tmp_path, eval_dataset_path=rows, max_eval_samples=3, max_steps=1)
    assert train_llm.main(argv) == 0
    assert "3 of 3 held-out rows are also trained on" in capsys.readouterr().out


def test_resume_auto_without_a_checkpoint_warns_and_starts_at_step_0(flags, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"st')
    assert run([*flags(tmp_path, max_steps=1), *RESUME]) == 0
    assert re.search(r"^WARNING:.*no good checkpoint.*step 0", capsys.readouterr().out, re.M)
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 1]


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


def test_checkpoints_on_another_disk_resume_by_their_path_and_stay_when_the_run_is_overwritten(
    flags, half, tmp_path
):
    """Of a link the link alone is removed."""
    disk = tmp_path / "disk" / "ck"
    disk.parent.mkdir()
    shutil.move(half / "checkpoints", disk)
    (half / "checkpoints").symlink_to(disk)
    step = half / "checkpoints" / "step_00000004"
    assert run([*flags(half, eval_interval=2), "--resume_from", str(step)]) == 0
    assert not (disk.parent / "run.json").exists()
    before = snapshot(disk)
    assert {"step_00000004", "step_00000006"} <= before.keys()
    with stopped_in(4):
        argv = [*flags(half, eval_interval=2), "--overwrite_output_dir"]
        assert run(argv) == 143
    assert [path.name[-1] for path in checkpoints(half)] == ["2"]
    assert snapshot(disk) == before


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
    assert "The best loss is sought anew: that of step 4 is not here" in out
    step = re.search(r"best [\d.]+ at step (\d+)", out)[1]
    assert train_llm.step_of(elsewhere / "best") == int(step)


def test_the_epochs_given_stand_above_the_steps_of_the_run(flags, half, capsys):
    assert run(["--resume_from", str(half), "--epochs", "2"]) == 0
    assert checkpoints(half)[-1].name == "step_00000012"  # 2 x 6 steps


def test_the_config_says_which_run_goes_on(flags, half, tmp_path, monkeypatch, capsys):
    config = tmp_path / "flags.yaml"
    config.write_text(f"output_dir: {half}\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run.json").write_text('{"settings": {"learning_rate": 0.5}}')
    assert run(["--config", str(config), *RESUME]) == 0
    assert "at step 5" in capsys.readouterr().out


def test_a_finished_run_resumes_to_exit_0_and_changes_nothing(finished, flags):
    directory = finished[0]
    argv = flags(
        directory, max_steps=None, epochs=2, num_samples=2, max_new_tokens=5, log_interval=2
    )
    before = snapshot(directory)
    assert run([*argv, *RESUME]) == 0
    assert snapshot(directory) == before


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
    assert "From here on steps in all: 6, not 4" in said
    assert "From here on held-out rows (sha256): " in said
    for bad, told in (
        ({"max_steps": 5}, "was to take 6 steps, not 5"),
        ({"lora_rank": 2}, "--lora_rank is 4, this run's 2"),
    ):
        error = refused([*flags(tmp_path, **changed | bad), *RESUME], capsys)
        assert told in error and "another --output_dir, without --resume_from" in error


def test_a_longer_run_keeps_its_warm_up(flags, tmp_path):
    assert run(flags(tmp_path, max_steps=20, num_samples=0)) == 0
    assert run([*flags(tmp_path, max_steps=60, num_samples=0), *RESUME]) == 0
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["warmup_steps"] == 2
