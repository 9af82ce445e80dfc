"""A flag that is out of range, unknown or leaves nothing to train on is refused in one line; the help
tells each flag's default.

    python -m pytest tests/pipeline/test_pipeline_flags.py
"""

from pathlib import Path

import pytest
from row_files import ROWS, alpaca_row, run_main

import data_pipeline

# ---------------------------------------------------------------- malformed files


def test_a_set_of_which_nothing_is_left_to_train_on_is_refused(refused, write):
    path = write([alpaca_row()])
    error = refused(
        "--dataset_path", path, "--eval_fraction", 0.9, "--plot", "lengths.png", "--num_workers", 0
    )
    assert "--eval_fraction" in error or str(path) in error


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--max_length", "0"),
        ("--max_length", "1"),
        ("--max_length", "-5"),
        ("--max_length", "100000000000000000000"),
        ("--max_length", "many"),
        ("--batch_size", "0"),
        ("--batch_size", "-8"),
        ("--batch_size", "2.5"),
        ("--batch_size", "100000000000000000000"),
        ("--num_workers", "-1"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--eval_fraction", "-0.1"),
        ("--eval_fraction", "1"),
        ("--eval_fraction", "nan"),
        ("--eval_fraction", "inf"),
        ("--max_samples", "-1"),
    ],
)
def test_a_flag_out_of_range_is_refused_by_name_and_value(refused, flag, value):
    error = refused("--plot", "lengths.png", "--num_workers", 0, flag, value)
    assert flag in error and value in error


@pytest.mark.parametrize(
    "flags", [["--batch", "4"], ["--max-length", "9"], ["--bogus"], ["extra"], ["--batch_size"]]
)
def test_unknown_and_abbreviated_flags_are_refused(refused, flags):
    assert flags[0] in refused(*flags)


@pytest.mark.parametrize(
    "flags, error",
    [
        (
            ["--max_length", 1, "--batch_size", -1],
            "argument --max_length: invalid int >= 2 and < 2147483648 value: '1'",
        ),
        (
            ["--batch_size", "x", "--seed", -1],
            "argument --batch_size: invalid int >= 1 and < 2147483648 value: 'x'",
        ),
        (["--eval_fraction", 1], "argument --eval_fraction: invalid float >= 0 and < 1 value: '1'"),
        (["--plot", ""], "argument --plot: invalid nonempty text value: ''"),
    ],
)
def test_the_first_bad_flag_is_refused_with_what_would_be_legal(refused, flags, error):
    assert refused(*flags) == error


@pytest.mark.parametrize("plot", ["no/such/directory/a.png", "a.unknown"])
def test_a_plot_that_cannot_be_drawn_is_refused(refused, write, plot):
    assert Path(plot).name.split(".")[1] in refused(
        "--dataset_path", write(ROWS), "--plot", plot, "--num_workers", 0
    )


def test_the_help_fits_80_columns_and_ends_each_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        data_pipeline.main(["--help"])
    shown = capsys.readouterr().out
    assert (
        max(map(len, shown.splitlines())) <= 80
        and "examples:\n    python data_pipeline.py" in shown
    )
    flags = [part.split("\n\n")[0].strip() for part in shown.split("\n  --")[1:]]
    assert [flag for flag in flags if not flag.endswith(")")] == []


def test_every_data_flag_of_the_two_scripts_is_known(write, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    flags = {
        "--dataset_path": write(ROWS),
        "--text_format": "alpaca",
        "--tokenizer_name_or_path": "gpt2",
        "--max_length": 64,
        "--batch_size": 2,
        "--num_workers": 0,
        "--seed": 1,
        "--eval_fraction": 0.1,
        "--eval_dataset_path": write(ROWS, "eval.jsonl"),
        "--max_samples": 6,
        "--max_eval_samples": 2,
    }
    assert "torch.Size([2, 64])" in run_main(
        capsys, *[part for flag in flags.items() for part in flag]
    )
