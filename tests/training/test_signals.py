"""A run that is told to stop writes its checkpoint and leaves with the right status, in other programs
and threads too.

    python -m pytest tests/training/test_signals.py
"""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from runs import RESUME, ROOT, checkpoints, in_micro_step, run, script
from transformers.utils import logging as transformers_logging

import train_llm


def started(argv, directory, **options):
    """The script in a process group of its own, once its third step is logged."""
    command = [sys.executable, str(ROOT / "train_llm.py"), *argv]
    log, environment = directory / "screen", os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True, **options
        )
    while "| Step    3/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    return process, log


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(flags, tmp_path, number):
    argv, by = (
        flags(tmp_path / "out", epochs=9, num_workers=2, max_steps=0),
        getattr(signal, number),
    )
    process, log = started(argv, tmp_path)
    os.killpg(process.pid, by)  # its workers too
    assert process.wait(60) == 128 + by, log.read_text()
    assert f"Stopped by {number} at step" in log.read_text()
    assert "error" not in log.read_text()
    assert run([*argv, *RESUME, "--max_steps=0"]) == 0


def test_timeout_sends_its_signal_twice_and_the_checkpoint_is_written(flags, tmp_path):
    process, log = started(flags(tmp_path / "out", max_steps=500), tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143, log.read_text()
    assert "Stopped by SIGTERM" in log.read_text()


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(flags, tmp_path):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process, log = started(flags(tmp_path / "out", max_steps=30), tmp_path, preexec_fn=nohup)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(60) == 0, log.read_text()


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
    for line in process.stdout:
        if b"| Step    3/6 " in line:
            process.send_signal(signal.SIGINT)
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == b""
    step = int(re.search(rb"Stopped by SIGINT at step (\d+)", rest)[1])
    assert checkpoints(tmp_path)[-1].name == f"step_{step:08d}"
