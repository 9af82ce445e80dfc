"""A run that is told to stop writes its checkpoint and leaves with the right status, in other programs
and threads too.

    python -m pytest tests/training/test_signals.py
"""

import io
import logging
import os
import re
import signal
import sys
import threading
import time

import pytest
from runs import RESUME, checkpoints, in_micro_step, run, script
from transformers.utils import logging as transformers_logging

import train_llm


def log_of(output_dir):
    return "".join(path.read_text("utf-8") for path in output_dir.glob("training_*.log"))


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_signal_to_the_process_and_its_whole_group_ends_with_a_checkpoint(
    flags, tmp_path, in_new_processes, number
):
    """Its workers get it too; and as `timeout` and torchrun send theirs, the process itself gets it twice."""
    argv, by = flags(tmp_path, num_workers=2), getattr(signal, number)
    asked = {"argv": argv, "output_dir": tmp_path, "signals": [(6, by)], "group": True}
    assert in_new_processes(asked) == ([128 + by], "")
    assert f"Stopped by {number} at step 3" in log_of(tmp_path)
    assert checkpoints(tmp_path)[-1].name == "step_00000003"
    assert run([*argv, *RESUME, "--num_workers=0"]) == 0


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(flags, tmp_path, in_new_processes):
    """As nohup does, and a script's `&` with Ctrl-C."""
    told = [(3, signal.SIGHUP), (5, signal.SIGINT)]
    asked = {"argv": flags(tmp_path), "output_dir": tmp_path, "signals": told}
    ignored = [signal.SIGHUP, signal.SIGINT]
    assert in_new_processes(asked | {"ignored": ignored}) == ([0], "")


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


def test_control_c_stops_the_script_with_130_and_a_checkpoint(flags, tmp_path):
    process = script(flags(tmp_path, max_steps=5000))
    limit = threading.Timer(120, process.kill)
    limit.start()
    for line in process.stdout:
        if b"| Step    3/6 " in line:
            process.send_signal(signal.SIGINT)
            break
    rest, error = process.communicate(timeout=60)
    limit.cancel()
    assert process.returncode == 130, error
    assert error == b""
    step = int(re.search(rb"Stopped by SIGINT at step (\d+)", rest)[1])
    assert checkpoints(tmp_path)[-1].name == f"step_{step:08d}"
