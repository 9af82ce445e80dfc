"""A run that is killed at any moment goes on from a good checkpoint with every row of its metrics once.

python -m pytest tests/training/test_killed.py
"""

import io
import re
import shutil
import signal
from contextlib import redirect_stdout

import pytest
from runs import RESUME, checkpoints, hidden_leftovers, outcome, run

import train_llm

KEEP_ONE = {"eval_interval": 2, "save_interval": 2, "save_total_limit": 1, "max_steps": 4}


@pytest.fixture(scope="module")
def killed_runs(flags, in_new_process, tmp_path_factory):
    """(what the run comes to that is not killed, {the change that it was killed right before: what it comes to when
    resumed}), with the status and the log of resuming."""
    directory = tmp_path_factory.mktemp("killed")
    whole, resumed = directory / "whole", {}
    assert in_new_process(flags(whole, **KEEP_ONE), whole, journal=directory / "journal") == 0
    journal = (directory / "journal").read_text().splitlines()
    first = next(i for i, line in enumerate(journal) if "checkpoints/step_00000002" in line) + 1
    chosen = {i for i, line in enumerate(journal) if i > first and line.startswith("os.rename")}
    chosen |= set(range(first, len(journal), 12))
    for i in sorted(chosen):
        output_dir = directory / f"killed_{i}"
        argv = flags(output_dir, **KEEP_ONE)
        assert in_new_process(argv, output_dir, die_at=i + 1) == -signal.SIGKILL, journal[i]
        with redirect_stdout(io.StringIO()) as out:
            status = run([*argv, *RESUME])
        leftovers = {
            "leftovers": hidden_leftovers(output_dir),
            "status": status,
            "log": out.getvalue(),
        }
        resumed[f"{i}: {journal[i]}"] = outcome(output_dir) | leftovers
    assert len(resumed) > 8
    return outcome(whole), resumed


def test_a_run_killed_at_any_moment_of_a_save_goes_on_from_a_good_checkpoint(killed_runs):
    expected, resumed = killed_runs
    for moment, found in resumed.items():
        assert (found["status"], found["leftovers"]) == (0, set()), moment
        assert "skipped" not in found["log"], moment
        assert re.search(r"Resumed from \S+ at step [24]\n", found["log"]), moment
        assert [
            key for key in expected if key != "metrics" and found[key] != expected[key]
        ] == [], moment


def test_metrics_of_a_killed_run_have_every_row_once(killed_runs):
    expected, resumed = killed_runs
    for moment, found in resumed.items():
        assert found["metrics"] == expected["metrics"], moment


def test_a_kill_while_a_checkpoint_replaces_itself_leaves_one(
    flags, in_new_process, tmp_path, capsys
):
    """A stop in a step that ends with a checkpoint anyway writes it twice; in between it must not be gone."""
    settings, stop = KEEP_ONE | {"eval_fraction": 0}, [(8, signal.SIGTERM)]
    argv = flags(tmp_path / "probe", **settings)
    assert (
        in_new_process(argv, tmp_path / "probe", journal=tmp_path / "journal", signals=stop) == 143
    )
    journal = (tmp_path / "journal").read_text().splitlines()
    moves = [
        i
        for i, line in enumerate(journal)
        if line.startswith("os.rename") and "step_00000004" in line
    ]
    for i in moves[1:]:
        output_dir = tmp_path / f"killed_{i}"
        argv = flags(output_dir, **settings)
        assert in_new_process(argv, output_dir, die_at=i + 1, signals=stop) == -signal.SIGKILL
        capsys.readouterr()
        assert run([*argv, *RESUME]) == 0
        assert re.search(r"Resumed from \S+ at step 4\n", capsys.readouterr().out), journal[i]


def test_a_second_sigint_leaves_at_once_with_the_older_checkpoint_good(
    flags, in_new_process, tmp_path
):
    argv = flags(tmp_path, **KEEP_ONE)
    assert in_new_process(argv, tmp_path, signals=[(5, signal.SIGINT), (6, signal.SIGINT)]) == 130
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]
    assert run([*argv, *RESUME]) == 0


def test_a_killed_run_with_workers_frees_its_lock(flags, in_new_process, tmp_path):
    argv = flags(tmp_path, **KEEP_ONE, num_workers=1)
    assert in_new_process(argv, tmp_path, signals=[(6, signal.SIGKILL)]) == -signal.SIGKILL
    assert run([*argv, *RESUME]) == 0


def test_a_best_model_that_a_kill_left_out_is_written_on_resuming(flags, tmp_path):
    assert run(flags(tmp_path / "whole", eval_interval=3)) == 0
    argv = flags(tmp_path / "cut", eval_interval=3)

    class Killed(BaseException):
        pass

    def killed(run):
        if run.progress.step == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_llm, "keep_best", killed)
        run(argv)
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step_00000003"]
    assert not (tmp_path / "cut" / "best").exists()
    # Where no later evaluation is better, nothing else would write it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_llm, "train", lambda _: None)
        assert run([*argv, *RESUME]) == 0
    assert (tmp_path / "cut" / "best" / "adapter_model.safetensors").exists()
    shutil.rmtree(tmp_path / "cut" / "final")
    assert run([*argv, *RESUME]) == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
