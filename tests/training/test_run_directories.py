"""No run takes, continues or overwrites a directory that is not its own, and two never share one.

python -m pytest tests/training/test_run_directories.py
"""

import shutil
import sys

import filelock
import pytest
from runs import RESUME, checkpoints, hidden_leftovers, metrics, outcome, refused, run, snapshot

import modify_llm


def test_a_start_that_is_refused_leaves_the_directory_of_the_one_at_work(
    flags, tmp_path, monkeypatch, capsys
):
    def at_work(self, timeout):
        raise filelock.Timeout(".lock")

    monkeypatch.setattr(filelock.FileLock, "acquire", at_work)
    assert "another run writes there" in refused(flags(tmp_path / "new" / "out"), capsys)
    assert (tmp_path / "new" / "out").is_dir()


def test_a_directory_that_cannot_be_made_is_refused(flags, capsys):
    assert "cannot be written to" in refused(flags("/proc/nosuch/out"), capsys)


@pytest.mark.parametrize("name", ["predictions.jsonl", "training_curves.png"])
def test_a_file_of_the_users_own_is_not_overwritten(flags, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert "--overwrite_output_dir" in refused(flags(tmp_path), capsys)
    assert (tmp_path / name).read_text() == "mine"


def test_stale_temporary_directories_are_ignored_and_removed(flags, half, half_done):
    for name in (".old_best", ".new_best_0123abcd", ".old_final_0123abcd"):
        shutil.copytree(half / "best", half / name)
    (half / "checkpoints" / ".new_step_00000009").write_text("{")
    (half / "checkpoints" / ".new_step_00000008").mkdir()
    unfinished = [half / f"{name}.new" for name in ("run.json", "metrics.jsonl")]
    for path in (*unfinished, half / "notes.json.new"):
        path.write_text("{")
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert outcome(half) == half_done[1]
    assert not hidden_leftovers(half) and not any(path.exists() for path in unfinished)
    assert (half / "notes.json.new").exists()  # nobody's but the user's


def test_hidden_directories_of_others_are_left_alone(flags, half, half_done):
    for name in (".old_notes", ".new_ideas", ".trash_talk"):
        (half / name).mkdir()
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert outcome(half) == half_done[1]
    assert hidden_leftovers(half) == {".old_notes", ".new_ideas", ".trash_talk"}


@pytest.mark.parametrize(("changes", "taken"), [({}, "best"), ({"from_scratch": "true"}, "base")])
def test_a_directory_that_would_be_replaced_is_not_taken_for_empty(
    flags, tmp_path, capsys, changes, taken
):
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "precious").write_text("mine")
    before = snapshot(tmp_path)
    assert "holds a run" in refused(flags(tmp_path, **changes), capsys)
    if taken == "base":
        assert "holds a run" in refused(["--demo", f"--output_dir={tmp_path}"], capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("lost", [False, True], ids=["another seed", "no checkpoint, another size"])
def test_a_base_from_scratch_is_the_one_that_the_result_was_trained_on(
    flags, tmp_path, small_base, lost
):
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
    }
    sizes |= {
        "model_name_or_path": None,
        "from_scratch": "true",
        "vocab_size": 257,
        "tokenizer_name_or_path": small_base,
    }
    assert run(flags(tmp_path, max_steps=1, **sizes)) == 0
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "final")
    changes = {"hidden_size": 48} if lost else {"seed": 3}
    assert run([*flags(tmp_path, max_steps=1, **sizes | changes), *RESUME]) == 0
    model = modify_llm.load_trained(tmp_path / "final")
    assert model.config.n_embd == (48 if lost else 24)


def test_a_run_is_not_continued_in_a_directory_around_it_that_holds_another(
    flags, tmp_path, capsys
):
    for directory in (tmp_path, tmp_path / "inner"):
        assert run(flags(directory, max_steps=1)) == 0
    argv = [*flags(tmp_path), "--resume_from", str(tmp_path / "inner")]
    assert "holds a run" in refused(argv, capsys)


@pytest.mark.parametrize(
    "used", ["adapter_path", "model_name_or_path", "dataset_path", "eval_dataset_path"]
)
def test_overwriting_never_removes_what_the_new_run_needs(flags, rows, tmp_path, capsys, used):
    assert run(flags(tmp_path, modification_type="full", max_steps=1)) == 0
    shutil.copy(rows, tmp_path / "best" / "rows.json")
    path = tmp_path / "best" / ("rows.json" if "dataset" in used else "")
    before = snapshot(tmp_path)
    changes = {"model_name_or_path": None, used: path} if used == "adapter_path" else {used: path}
    assert "--overwrite_output_dir: would remove" in refused(
        flags(tmp_path, overwrite_output_dir="true", **changes), capsys
    )
    assert snapshot(tmp_path) == before


def test_a_run_is_not_continued_in_a_directory_that_holds_another(flags, half, tmp_path, capsys):
    assert run(flags(tmp_path / "other", max_steps=1)) == 0
    before = snapshot(tmp_path)
    for start in (half, checkpoints(half)[0]):
        argv = [*flags(tmp_path / "other", eval_interval=2), "--resume_from", str(start)]
        assert "holds a run" in refused(argv, capsys)
    assert snapshot(tmp_path) == before


def test_an_output_directory_that_holds_a_run_is_refused_and_overwritten_only_when_asked(
    flags, half, capsys
):
    (half / "notes.txt").write_text("mine")
    before = snapshot(half)
    assert "--overwrite_output_dir" in refused(flags(half), capsys)
    assert snapshot(half) == before
    assert run([*flags(half, max_steps=1), "--overwrite_output_dir"]) == 0
    assert [path.name for path in checkpoints(half)] == ["step_00000001"]
    assert [row["step"] for row in metrics(half)] == [0, 1, 1]
    assert len(list(half.glob("training_*.log"))) == 1
    assert (half / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_target_modules": "nothing"},
        {"modification_type": "selective", "freeze_layers": "9"},
        {"max_length": 500},
        {"model_name_or_path": "EMPTY", "tokenizer_name_or_path": "gpt2"},
        {"dataset_path": "absent.json"},
        {"report_to": "tensorboard"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_overwriting_destroys_nothing_when_the_new_run_cannot_start(
    flags, half, tmp_path, capsys, monkeypatch, changes
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    (tmp_path / "empty").mkdir()
    changes = {
        key: str(tmp_path / "empty") if value == "EMPTY" else value
        for key, value in changes.items()
    }
    before = snapshot(half)
    refused([*flags(half, **changes), "--overwrite_output_dir"], capsys)
    assert snapshot(half) == before


def test_overwriting_the_run_that_the_new_one_starts_from_loses_neither(flags, half, capsys):
    before = snapshot(half)
    argv = flags(half, adapter_path=half / "best", max_steps=1)
    if run([*argv, "--overwrite_output_dir"]) == 0:
        assert (half / "final" / "adapter_model.safetensors").exists()
    else:
        assert snapshot(half) == before


def test_a_second_run_in_the_same_directory_is_refused(flags, half, capsys, monkeypatch):
    acquire = filelock.FileLock.acquire
    before = snapshot(half)
    with filelock.FileLock(
        half / ".lock"
    ):  # the wait of some seconds is for a lock whose owner has just died
        monkeypatch.setattr(
            filelock.FileLock, "acquire", lambda self, *_, **__: acquire(self, timeout=0.1)
        )
        assert "another run" in refused([*flags(half, eval_interval=2), *RESUME], capsys)
        assert "another run" in refused([*flags(half), "--overwrite_output_dir"], capsys)
        assert "another run" in refused(
            ["--demo", "--output_dir", str(half), "--overwrite_output_dir"], capsys
        )
    assert snapshot(half) == before


def test_a_run_that_came_and_went_while_another_waited_is_not_written_over(
    flags, tmp_path, capsys, monkeypatch
):
    acquire = filelock.FileLock.acquire

    def finish_another_run_first(self, *args, **kwargs):
        monkeypatch.undo()
        assert run(flags(tmp_path, max_steps=1)) == 0
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", finish_another_run_first)
    assert "holds a run" in refused(flags(tmp_path), capsys)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]


def test_a_lock_file_without_an_owner_stops_nobody(flags, tmp_path):
    (tmp_path / ".lock").touch()
    assert run(flags(tmp_path, max_steps=1)) == 0


def test_of_two_starts_with_auto_the_second_goes_on_from_what_the_first_wrote(
    flags, tmp_path, in_new_processes
):
    """The second has prepared while the first was at work: it looks at the directory only once it
    is its own."""
    start = {"argv": [*flags(tmp_path / "out", max_steps=4), *RESUME], "output_dir": tmp_path}
    statuses, said = in_new_processes(start, start)
    assert statuses == [0, 0] or sorted(statuses) == [0, 2], said
    assert [row["step"] for row in metrics(tmp_path / "out") if "loss" in row] == [1, 2, 3, 4]


def test_a_refused_start_leaves_no_directory(flags, tmp_path, capsys):
    out = tmp_path / "some" / "where"
    refused(flags(out, eval_fraction=0.999), capsys)
    assert not (tmp_path / "some").exists()
