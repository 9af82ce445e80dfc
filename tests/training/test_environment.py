"""What a shell or a batch system left in the environment changes no run, or is refused by its name.

python -m pytest tests/training/test_environment.py
"""

import os
import re
import time

import pytest
import torch
from runs import TORCHRUN, checkpoints, refused, run, training_losses

import data_pipeline
import train_llm

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
WHOLE |= {"MASTER_ADDR": "localhost"}


@pytest.fixture
def left_behind(monkeypatch):
    """Sets variables, and none of the others that torchrun sets."""

    def leave(**variables):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return leave


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "8"},
        {"RANK": "8", "WORLD_SIZE": ""},
        {"RANK": "8", "WORLD_SIZE": "1"},
        {"RANK": "lora", "LOCAL_RANK": "3"},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "gone"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
    ],
    ids=lambda variables: "-".join(variables) or "none",
)
def test_a_rank_counts_only_among_several_processes(variables, left_behind):
    left_behind(**variables)
    assert train_llm.place_of_process() == {"world_size": 1, "rank": 0, "local_rank": 0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict.fromkeys(WHOLE.keys() - {"WORLD_SIZE"}, ""), "RANK="),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "first"}, "RANK=first"),
        ({"RANK": "2"}, "RANK=2"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK="),
        ({"MASTER_PORT": ""}, "MASTER_PORT="),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_several_processes_of_which_something_is_missing_are_refused_by_the_variable(
    changes, named, left_behind, flags, tmp_path, capsys, nothing_loads
):
    left_behind(**WHOLE)
    assert train_llm.place_of_process() == {"world_size": 2, "rank": 1, "local_rank": 0}
    left_behind(**WHOLE | changes)
    told = refused(flags(tmp_path / "out"), capsys)
    assert f" {named} in the environment" in told and "torchrun" in told


def test_a_sweeps_rank_does_not_silence_the_run(left_behind, flags, tmp_path, capsys):
    left_behind(RANK="8", LOCAL_RANK="8")
    assert run(flags(tmp_path, max_steps=1)) == 0
    assert "| Step    1/6 | Loss: " in capsys.readouterr().out
    assert len(training_losses(tmp_path)) == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_waits_for_others_says_for_whom(rank, left_behind, monkeypatch, capsys):
    left_behind(**WHOLE | {"RANK": rank})
    timer = train_llm.threading.Timer
    monkeypatch.setattr(train_llm.threading, "Timer", lambda _, *said: timer(0.1, *said))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: time.sleep(0.5))
    with train_llm.logging_to_screen(int(rank)):  # of which process 0 alone logs
        train_llm.join_processes(None)
    said = "".join(capsys.readouterr())
    assert "2 in all" in said and "localhost:29500" in said


def test_processes_that_are_there_at_once_do_not_speak_of_waiting(left_behind, monkeypatch, capsys):
    left_behind(**WHOLE)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    train_llm.join_processes(None)
    time.sleep(0.1)
    assert "".join(capsys.readouterr()) == ""
    assert not [
        t for t in train_llm.threading.enumerate() if isinstance(t, train_llm.threading.Timer)
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_long_directory_for_temporary_files_does_not_stop_workers(
    flags, tmp_path, in_new_processes
):
    """A socket's path may have 107 bytes."""
    long = tmp_path / ("t" * 124)
    long.mkdir()
    asked = {"argv": flags(tmp_path / "out", num_workers=2), "output_dir": tmp_path / "out"}
    assert in_new_processes(asked | {"environment": {"TMPDIR": str(long)}}) == ([0], "")


def test_few_open_files_and_many_workers_end_in_one_line_or_not_at_all(
    flags, tmp_path, in_new_processes
):
    argv = flags(tmp_path, num_workers=4, save_interval=1, eval_fraction=0, batch_size=1)
    asked = {"argv": argv, "output_dir": tmp_path, "open_files": 64}
    (status,), error = in_new_processes(asked)
    assert (status, error) == (0, "") or (
        status == 1 and re.fullmatch(r"train_llm\.py: error: \S.*\n", error)
    ), error


def test_what_fails_in_a_worker_ends_the_run_in_one_line_with_its_checkpoint(
    flags, tmp_path, capsys, monkeypatch
):
    get, parent = data_pipeline.AlpacaDataset.__getitem__, os.getpid()

    def odd(self, row):
        if os.getpid() != parent and row == 7:
            raise OSError(24, "Too many open files")
        return get(self, row)

    monkeypatch.setattr(data_pipeline.AlpacaDataset, "__getitem__", odd)
    argv = flags(tmp_path, num_workers=1, save_interval=1, eval_fraction=0, batch_size=1)
    told = refused([*argv, "--gradient_accumulation_steps=1", "--max_steps=26"], capsys, status=1)
    assert "Too many open files" in told
    assert checkpoints(tmp_path)


def test_an_output_directory_that_is_not_utf_8_is_refused_before_the_run(
    flags, capsys, nothing_loads
):
    assert "--output_dir: " in (told := refused(flags("/tmp/caf\udce9"), capsys))
    assert "is not UTF-8" in told
