"""Several processes take the steps that one would, stop together and leave together.

python -m pytest tests/training/test_several_processes.py
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from runs import (
    RESUME,
    ROOT,
    checkpoints,
    held_out_losses,
    metrics,
    outcome,
    refused,
    run,
    snapshot,
    training_losses,
)

import train_llm

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


def two_ranks(in_new_processes, *requests):
    """Two processes that train together: (exit statuses, stderr)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    asked = [{"environment": rank} | request for rank, request in zip(ranks, requests, strict=True)]
    return in_new_processes(*asked)


@pytest.fixture(scope="module")
def two_processes(flags, in_new_processes, tmp_path_factory):
    """(output directory, and how it went) of two ranks: one is killed under torchrun, then both finish the run, each
    in some number of parts."""
    directory = tmp_path_factory.mktemp("two")
    output_dir, program, start = directory / "out", directory / "mortal.py", time.monotonic()
    program.write_text(MORTAL.format(root=str(ROOT), directory=str(directory)))
    killed = torchrun(program, flags(output_dir, **TWO_BY_FOUR))
    seconds, kept = time.monotonic() - start, [path.name for path in checkpoints(output_dir)]
    pids = [int((directory / f"pid_{rank}").read_text()) for rank in (0, 1)]
    asked = {"argv": [*flags(output_dir, **TWO_BY_FOUR), *RESUME], "output_dir": output_dir}
    asked |= {"constants": {"CPU_TOKENS": 30}}
    finished = two_ranks(in_new_processes, asked, asked)
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
    assert told["finished"] == ([0, 0], "")
    logs = "".join(path.read_text("utf-8") for path in output_dir.glob("training_*.log"))
    assert "step_00000004 at step 4\n" in logs  # resumed
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
    assert "processes) is 8, this run's 4" in told and "another --output_dir" in told
    assert snapshot(output_dir) == before
    split = TWO_BY_FOUR | {"batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 10}
    assert run([*flags(output_dir, **split), *RESUME]) == 0
    said = capsys.readouterr().out
    assert "From here on processes: 1, not 2" in said
    assert "From here on steps in all: 10, not 8" in said
    assert [row["step"] for row in metrics(output_dir) if "loss" in row] == list(range(1, 11))


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


def test_a_rank_that_raises_ends_all_at_once(flags, in_new_processes, tmp_path):
    start = time.monotonic()
    asked = {"argv": flags(tmp_path, **TWO_BY_FOUR), "output_dir": tmp_path}
    statuses, error = two_ranks(in_new_processes, asked, asked | {"fail_at": 5})
    assert statuses == [1, 1] and time.monotonic() - start < 60
    assert "train_llm.py: error: process 1: no luck\n" in error
    assert "Traceback" not in error


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
