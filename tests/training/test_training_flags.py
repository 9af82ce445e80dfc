"""Flags come from the command line or a file; what is out of range or makes no sense is refused, what has
no effect pointed out.

    python -m pytest tests/training/test_training_flags.py
"""

import json
import re
import shutil

import pytest
from runs import RESUME, outcome, refused, run

import train_llm


def test_a_run_is_repeated_to_the_bit_from_its_run_json(finished, tmp_path):
    config = finished[0] / "run.json"
    assert run(["--config", str(config), "--output_dir", str(tmp_path / "again")]) == 0
    assert outcome(tmp_path / "again") == outcome(finished[0])
    settings = [
        json.loads((path / "run.json").read_text())["settings"]
        for path in (finished[0], tmp_path / "again")
    ]
    differ = {name for name, value in settings[0].items() if value != settings[1][name]}
    assert differ <= {"config", "output_dir"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.yaml", "epochs: 1\nreport_to: [a\nlora_rank: 2\n", "line 3: expected ',' or ']'"),
        ("c.json", '{"epochs": 1,\n}', "Expecting property name enclosed in double quotes: line 2"),
        ("c.json", '{"epochs": 0}', "--epochs: "),
    ],
)
def test_a_file_of_flags_that_cannot_be_read_is_told_by_line_or_flag(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"--config {tmp_path / name}: {said}")):
        train_llm.flags_of(tmp_path / name, f"--config {tmp_path / name}")


def test_the_command_line_stands_above_a_yaml_file_of_flags(flags, tmp_path):
    pairs = [flag.removeprefix("--").split("=", 1) for flag in flags(tmp_path / "out")]
    lines = [f"{name}: {json.dumps(value)}" for name, value in pairs]
    lines = [*lines, "freeze_layers: [0]", "lora_rank: 2", "max_grad_norm: 1e-1"]
    (tmp_path / "flags.yaml").write_text("\n".join(lines))
    assert run(["--config", str(tmp_path / "flags.yaml"), "--max_steps=1", "--lora_rank=3"]) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    expected = {"max_steps": 1, "lora_rank": 3, "freeze_layers": [0], "max_grad_norm": 0.1}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"lerning_rate": 1}', "--lerning_rate: no such flag; did you mean --learning_rate?"),
        ('{"lora_rank": 0}', "--lora_rank: invalid int >= 1"),
        ("[1, 2]", "flags.json"),
        ("{", "flags.json"),
    ],
)
def test_a_file_of_flags_is_checked_as_the_command_line_is(content, told, tmp_path, capsys):
    path = tmp_path / "flags.json"
    path.write_text(content)
    said = refused(["--config", str(path), "--dataset_path", "x"], capsys)
    assert f"--config {path}" in said and told in said


def test_a_run_goes_on_with_its_own_settings(flags, half, half_done, tmp_path, capsys):
    again, changed = (shutil.copytree(half, tmp_path / name) for name in ("again", "changed"))
    assert run(["--output_dir", str(half), *RESUME]) == 0
    assert run(["--resume_from", str(again)]) == 0
    assert outcome(half) == outcome(again) == half_done[1]
    assert "--lora_rank is 4, this run's 2" in refused(
        ["--resume_from", str(changed), "--lora_rank=2"], capsys
    )


def test_a_misspelt_flag_or_path_gets_the_nearest_one(flags, tmp_path, rows, capsys):
    told = refused([*flags(tmp_path / "out"), "--lerning_rate=1"], capsys)
    assert "--lerning_rate: no such flag; did you mean --learning_rate?" in told
    told = refused(flags(tmp_path / "out", dataset_path=rows.with_name("row.json")), capsys)
    assert told.endswith("; did you mean rows.json?\n")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"early_stopping_patience": 2, "eval_fraction": 0}, "--early_stopping_patience: needs"),
        ({"min_lr": 0.1, "learning_rate": 0.01}, "--min_lr 0.1: above --learning_rate 0.01"),
        ({"temperature": 1e-20}, "--temperature"),
        ({"temperature": 1e9}, "--temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told, flags, tmp_path, capsys):
    assert told in refused(flags(tmp_path, **settings), capsys)


BAD_NUMBERS = {
    "max_length": ["1", "0", "-1", "x", "1.5"], "batch_size": ["0", "-8"], "num_workers": ["-1"],
    "seed": ["-1", "9223372036854775808"], "eval_fraction": ["-0.1", "1", "nan", "inf"], "max_samples": ["-1"],
    "max_eval_samples": ["-1"], "vocab_size": ["0"], "hidden_size": ["0"], "num_attention_heads": ["0"],
    "num_hidden_layers": ["0"], "max_position_embeddings": ["0"], "dropout": ["-0.1", "1", "nan"],
    "lora_rank": ["0", "-4", "nan"], "lora_alpha": ["0", "-1", "nan", "inf"], "lora_dropout": ["1", "-1", "nan"],
    "adapter_size": ["0"], "prefix_length": ["0"], "prefix_projection_size": ["-1", "8"], "epochs": ["0", "-1"],
    "max_steps": ["-1"], "learning_rate": ["0", "-0.1", "nan", "inf"], "weight_decay": ["-0.1", "nan", "inf"],
    "max_grad_norm": ["-1", "nan", "inf"], "gradient_accumulation_steps": ["0", "4294967296"], "warmup_steps": ["-1"],
    "lora_plus_ratio": ["0", "-1", "nan", "inf"], "length_penalty": ["-101", "nan", "inf"],
    "label_smoothing": ["-0.1", "1", "nan"], "adam_beta1": ["-0.1", "1", "nan"], "adam_beta2": ["-0.1", "1", "nan"],
    "adam_epsilon": ["0", "-1", "nan", "inf"], "min_lr": ["-1", "nan", "inf"], "log_interval": ["0"], "eval_interval": ["-1"], "save_interval": ["-1"],
    "save_total_limit": ["0"], "early_stopping_patience": ["-1"], "max_new_tokens": ["0"],
    "temperature": ["-1", "nan", "inf"], "num_samples": ["-1"], "top_p": ["0", "1.1"],
    "repetition_penalty": ["0.9", "nan"], "num_beams": ["0"], "no_repeat_ngram_size": ["-1"], "eval_answers": ["-1"],
    "seeds": ["0"], "split_seed": ["-1"], "learning_rates": ["0", "1e-3,nan", "1e-3,x"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in BAD_NUMBERS.items() for value in values]
)
def test_a_number_out_of_range_is_refused_before_anything_loads(
    flags, tmp_path, capsys, nothing_loads, flag, value
):
    assert f"--{flag}" in refused([*flags(tmp_path / "out"), f"--{flag}={value}"], capsys)
    assert not (tmp_path / "out").exists()


def test_every_numeric_flag_is_among_those():
    without_default = {"learning_rate", "warmup_steps", "split_seed", "learning_rates"}
    numbers = {n for n, d in train_llm.DEFAULTS.items() if type(d) in (int, float)}
    assert numbers | without_default == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (["--learning", "1"], "--learning"),
        (["--from_scratch", "maybe"], "--from_scratch"),
        (["--scheduler", "stairs"], "--scheduler"),
        (["--modification_type", "magic"], "--modification_type"),
        (["--freeze_layers", "a"], "--freeze_layers"),
        (["--resume_from", "auto", "--overwrite_output_dir"], "--overwrite_output_dir"),
        (
            ["--gradient_checkpointing", "--modification_type=prefix", "--prefix_type=key_value"],
            "--gradient_check",
        ),
        (["--precision", "fp16"], "--precision fp16"),
        (["--demo", "--resume_from", "auto"], "--resume_from"),
        (["--adapter_path", "absent", "--from_scratch"], "--from_scratch"),
        (["--output_dir="], "--output_dir"),
        (["--adapter_path="], "--adapter_path"),
        (["--resume_from="], "--resume_from"),
        (["--model_name_or_path="], "--model_name_or_path"),
        (["--tokenizer_name_or_path="], "--tokenizer_name_or_path"),
        (["--eval_dataset_path="], "--eval_dataset_path"),
        (["--demo", "--adapter_path", "absent"], "--adapter_path"),
        (["--prompt", "byte \udcff"], "--prompt"),
        (["--text_format", "byte \udcff||{a}"], "--text_format"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, tmp_path, capsys, nothing_loads, bad, said):
    assert said in refused([*flags(tmp_path / "out"), *bad], capsys)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapter_size": 8}, "--adapter_size: without effect with --modification_type lora"),
        ({"num_hidden_layers": 3}, "--num_hidden_layers: without effect"),
        (
            {"modification_type": "full", "trainable_modules": "wte"},
            "--trainable_modules: without effect",
        ),
        ({"scheduler": "cosine", "warmup_steps": 2}, "--warmup_steps: without effect"),
        ({"scheduler": "constant", "min_lr": 1e-6}, "--min_lr: without effect"),
        ({"eval_only": "true", "max_steps": 2}, "--max_steps: without effect, nothing is trained"),
        (
            {"dataset_path": None, "prompt": "x", "learning_rate": 1},
            "--learning_rate: without effect",
        ),
        (
            {"dataset_path": None, "prompt": "x", "modification_type": "full"},
            "--modification_type: without effect",
        ),
    ],
)
def test_a_flag_without_effect_is_pointed_out(flags, tmp_path, capsys, given, said):
    run(flags(tmp_path / "out", **{"max_steps": 1} | given))
    assert f"WARNING:train_llm:{said}" in capsys.readouterr().out


def test_eval_fraction_beside_a_file_of_held_out_rows_is_pointed_out(flags, tmp_path, rows, capsys):
    run(flags(tmp_path, eval_dataset_path=rows, eval_fraction=0.5, max_steps=1))
    assert "--eval_fraction: without effect" in capsys.readouterr().out


def test_flags_that_have_an_effect_are_not_pointed_out(flags, tmp_path, capsys):
    run(
        flags(
            tmp_path / "out", max_steps=1, lora_rank=2, lora_target_modules="c_attn", warmup_steps=1
        )
    )
    assert "without effect" not in capsys.readouterr().out


def test_a_dataset_is_required_to_train(tmp_path, capsys, nothing_loads):
    assert "--dataset_path" in refused(["--output_dir", str(tmp_path / "out")], capsys)
