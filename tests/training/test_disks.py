"""Disks that are full, elsewhere or cannot sync, lock or rename cost a warning or one line, never a
checkpoint.

    python -m pytest tests/training/test_disks.py
"""

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

import filelock
import pytest
import torch
from runs import RESUME, ROOT, hidden_leftovers, in_micro_step, outcome, refused, run, snapshot
from safetensors.torch import load_file


def test_run_json_survives_a_disk_that_is_full_when_it_is_written_again(
    flags, half, in_new_process
):
    before = (half / "run.json").read_text()
    argv = [*flags(half, eval_interval=2), *RESUME]
    assert in_new_process(argv, half, file_limit=500) == 1
    assert (half / "run.json").read_text() == before


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
    said = capsys.readouterr().out
    assert re.search(r"^WARNING:.*no locks there: see that no second run", said, re.M)


def test_a_lock_that_is_held_elsewhere_names_the_file_to_remove(
    flags, tmp_path, capsys, monkeypatch
):
    def held(*_, **__):
        raise filelock.Timeout(str(tmp_path / ".lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", held)
    assert f"remove {tmp_path / '.lock'}" in refused(flags(tmp_path), capsys)


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
        kept = [h for h in logging.getLogger().handlers if isinstance(h, MemoryHandler)]
        (log,) = (handler.target for handler in kept)
        os.dup2(os.open("/dev/full", os.O_WRONLY), log.stream.fileno())
        logging.getLogger().info("what no disk holds")
        log.stream.write("nor this")
        raise OSError(28, "No space left on device")

    with in_micro_step(3, fill_the_disk):
        assert "No space left" in refused(flags(tmp_path), capsys, status=1)


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
