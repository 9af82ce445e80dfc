"""What fails while a run trains ends in one line and the right status, with earlier checkpoints intact.

python -m pytest tests/training/test_failures.py
"""

import errno
import math
import multiprocessing
import os
import re
import signal

import pytest
import torch
from runs import (
    RESUME,
    checkpoints,
    in_micro_step,
    infinite_gradient,
    out_of_memory,
    refused,
    run,
    training_losses,
)


def nan_loss(loss):
    return loss * math.nan


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


def test_a_closed_stdout_does_not_end_the_run(flags, tmp_path, in_new_processes):
    asked = {"argv": flags(tmp_path, num_samples=1, max_new_tokens=2), "output_dir": tmp_path}
    assert in_new_processes(asked | {"closed_stdout": True}) == ([0], "")
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
    assert re.search(
        r"^Epoch 0 \| Step    6/6 ", next(tmp_path.glob("*.log")).read_text(encoding="utf-8"), re.M
    )
