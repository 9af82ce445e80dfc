"""Whatever is wrong with the input ends in one line and status 2 with nothing written.

python -m pytest tests/training/test_bad_input.py
"""

import json
import re
import socket
import time

import pytest
from runs import RESUME, metrics, refused, run, script


@pytest.mark.parametrize(
    "changes", [{"text_format": "{q}{a}||{a}", "prompt": "no object"}, {"prompt": "a" * 128}]
)
def test_a_prompt_that_cannot_be_put_is_told_before_the_training(flags, tmp_path, capsys, changes):
    argv = flags(tmp_path / "out", **changes)
    assert "--prompt" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_bad_evaluation_file_is_told_by_its_own_flag(flags, tmp_path, capsys):
    assert "--eval_dataset_path absent.json" in refused(
        flags(tmp_path, eval_dataset_path="absent.json"), capsys
    )


def test_max_samples_limits_the_held_out_share_too(flags, tmp_path):
    argv = {"max_steps": 1, "max_samples": 8, "eval_fraction": 0.2}
    for name, limit, held_out in (("a", None, 2), ("b", 3, 3)):
        assert run(flags(tmp_path / name, **argv, max_eval_samples=limit)) == 0
        log = next((tmp_path / name).glob("training_*.log")).read_text()
        assert f"8 to train on, {held_out} held out" in log


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_path": "absent.json"}, "absent.json"),
        ({"dataset_path": "EMPTY"}, "rows.json"),
        ({"dataset_path": "UNLABELLED"}, "unlabelled.json"),
        ({"eval_dataset_path": "absent.json"}, "absent.json"),
        ({"eval_dataset_path": "UNLABELLED"}, "--eval_dataset_path"),
        ({"eval_fraction": 0.99}, "--eval_fraction 0.99"),
        ({"resume_from": "absent"}, "--resume_from absent"),
        ({"resume_from": "TMP"}, "no good checkpoint"),
        ({"text_format": "{q}||{absent}"}, "absent"),
        ({"model_name_or_path": "TMP"}, "--model_name_or_path"),
        ({"model_name_or_path": "nobody/nothing"}, "--model_name_or_path nobody/nothing"),
        ({"tokenizer_name_or_path": "nobody/nothing"}, "--tokenizer_name_or_path nobody/nothing"),
        ({"adapter_path": "TMP"}, "modification.json"),
        ({"lora_target_modules": "nothing"}, "c_attn"),
        ({"modification_type": "selective", "freeze_layers": "2"}, "--freeze_layers 2"),
        ({"max_length": 129}, "--max_length 129"),
        (
            {"max_length": 120, "modification_type": "prefix", "prefix_length": 9},
            "--max_length 120",
        ),
        ({"tokenizer_name_or_path": "gpt2"}, "50257"),
        (
            {"from_scratch": "true", "max_position_embeddings": 64, "hidden_size": 24},
            "64 positions",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_one_line_with_nothing_written(
    flags, tmp_path, capsys, changes, said
):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "unlabelled.json").write_text(json.dumps([{"q": "x", "a": ""}]))
    places = {"EMPTY": "rows.json", "UNLABELLED": "unlabelled.json", "TMP": ""}
    changes = {k: tmp_path / places[v] if v in places else v for k, v in changes.items()}
    assert said in refused(flags(tmp_path / "out", **changes), capsys)
    assert not (tmp_path / "out").exists()


def test_an_output_dir_that_is_a_file_is_refused(flags, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    for more in ([], ["--overwrite_output_dir"], RESUME):
        assert "--output_dir" in refused([*flags(tmp_path / "out"), *more], capsys)
        assert "--output_dir" in refused([*flags(tmp_path / "out" / "below"), *more], capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_rows_without_a_label_are_left_out_and_fewer_rows_than_a_batch_train(
    flags, tmp_path, capsys
):
    text = [
        {"q": "x", "a": "y"},
        {"q": "x", "a": ""},
        {"q": "z" * 200, "a": "y"},
        {"q": "", "a": "y"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, text)))
    argv = flags(
        tmp_path / "out",
        dataset_path=tmp_path / "rows.jsonl",
        eval_fraction=0,
        max_steps=None,
        batch_size=8,
    )
    assert run([*argv, "--epochs=2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^INFO:train_llm:2 rows .*left out", out, re.M)
    assert re.search(r"Rows: +2 to train on, 0 held out", out)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2]


def test_a_held_out_file_replaces_the_fraction_and_limits_take_the_first_rows(
    flags, tmp_path, rows, capsys
):
    argv = flags(tmp_path, eval_dataset_path=rows, max_samples=7, max_eval_samples=3, max_steps=1)
    assert run(argv) == 0
    assert re.search(r"Rows: +7 to train on, 3 held out", capsys.readouterr().out)
    first = json.loads(rows.read_text())[:3]
    assert metrics(tmp_path)[0]["eval_tokens"] == sum(len(row["a"]) + 1 for row in first)


def test_a_hub_that_never_answers_ends_in_exit_2_within_seconds(flags, tmp_path, small_base):
    absent = {"model_name_or_path": "nobody/nothing", "tokenizer_name_or_path": small_base}
    asked = {
        "model_name_or_path": absent,
        "tokenizer_name_or_path": {"tokenizer_name_or_path": "nobody/nothing"},
    }
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.settimeout(60)
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub would ask a question of its own first
        }
        environment["HF_HOME"] = str(tmp_path / "home")
        processes = {
            flag: script(flags(tmp_path / "out", **names), **environment)
            for flag, names in asked.items()
        }
        with deaf.accept()[0], deaf.accept()[0]:  # from the first questions on
            start = time.monotonic()
            errors = {
                flag: process.communicate(timeout=120)[1].decode()
                for flag, process in processes.items()
            }
            seconds = time.monotonic() - start
    for flag, error in errors.items():
        assert processes[flag].returncode == 2
        assert re.fullmatch(rf"train_llm\.py: error: --{flag} nobody/nothing: .*\n", error), error
    assert seconds < 15
    assert not (tmp_path / "out").exists()
