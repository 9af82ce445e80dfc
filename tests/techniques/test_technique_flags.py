"""A flag that no model can follow is refused in one line that names it, one without effect is pointed
out, and the help tells each flag's default.

    python -m pytest tests/techniques/test_technique_flags.py
"""

import io
import os
import re
import subprocess
import sys

import pytest
from small_models import base_with, modified, refused

import modify_llm
from modify_llm import main

IMPOSSIBLE = [
    {"n_embd": "x"},
    {"n_layer": None},
    {"n_head": 0},
    {"n_head": 5},
    {"n_positions": -3},
    {"activation_function": "nope"},
    {"n_layer": -1},
    {"vocab_size": 0},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_a_configuration_that_no_model_can_have_is_refused_in_one_line(
    capsys, base, tmp_path, changes
):
    directory = base_with(base, tmp_path / "base", **changes)
    where = f"--model_name_or_path {directory}"
    with pytest.raises(ValueError, match=rf"^{re.escape(where)}: \S") as error:
        modified(directory)
    assert "\n" not in str(error.value)
    assert refused(capsys, ["--model_name_or_path", directory]) == str(error.value)


@pytest.mark.parametrize(
    "flags", ["--compare --lora_rank 8", "--merge_to merged --adapter_path absent --lora_rank 8"]
)
def test_a_flag_without_effect_on_the_task_is_pointed_out(capsys, caplog, monkeypatch, flags):
    monkeypatch.setattr(modify_llm, "merge_directory", lambda *_: None)
    assert main(flags.split()) == 0
    assert any("--lora_rank: without effect" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("value", [[], ["true"]], ids=["bare", "true"])
def test_a_switch_may_stand_bare_or_with_its_value(capsys, value):
    assert main(["--model_name_or_path", "distilgpt2", "--compare", *value]) == 0
    assert "Houlsby 2019" in capsys.readouterr().out


def test_a_terminal_without_emoji_gets_the_lines_all_the_same(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    main([])
    sys.stdout.flush()
    text = written.getvalue().decode("cp1252")
    assert (
        "Final Parameter Statistics:" in text
        and "transformer.h.0.attn.c_attn.lora_A: Trainable" in text
    )


def test_the_help_fits_80_columns_and_ends_each_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert (
        max(map(len, shown.splitlines())) <= 80 and "examples:\n    python modify_llm.py" in shown
    )
    flags = [part.split("\n\n")[0].strip() for part in shown.split("\n  --")[1:]]
    assert [flag for flag in flags if not flag.endswith(")")] == []
    assert ">= 1 (4)" in shown and "(c_attn,c_proj,c_fc)" in shown


@pytest.mark.skipif(os.name == "nt", reason="needs a shell's pipes")
def test_output_that_nobody_reads_ends_without_a_word_of_complaint():
    pipeline = ["sh", "-c", '"$@" | head -1', "sh", sys.executable, modify_llm.__file__]
    done = subprocess.run(pipeline, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--lora_target_modules q_proj",
            ["--lora_target_modules q_proj", "c_attn", "c_fc", "c_proj"],
        ),
        ("--lora_target_modules fc", ["--lora_target_modules fc", "matches nothing"]),
        ("--lora_target_modules c_fc,attn.c_fc", ["attn.c_fc", "matches nothing"]),
        ("--lora_target_modules c_fc,mlp.c_fc", ["mlp.c_fc", "another target"]),
        ("--lora_target_modules c_attn.q,c_attn", ["c_attn", "another target"]),
        ("--lora_target_modules c_attn,c_attn.v", ["c_attn.v", "another target"]),
        ("--lora_target_modules c_proj.q", ["c_proj.q", "matches nothing"]),
        ("--lora_target_modules wte", ["wte", "Embedding"]),
        ("--lora_target_modules ln_1", ["ln_1", "LayerNorm"]),
        ("--lora_target_modules attn", ["attn", "GPT2Attention"]),
        ("--lora_target_modules lm_head", ["lm_head", "shares its weight"]),
        ("--lora_target_modules ,", ["--lora_target_modules"]),
        ("--trainable_modules ln_9", ["--trainable_modules ln_9", "ln_1", "wte"]),
        ("--trainable_modules c_attn", ["--trainable_modules c_attn", "wrapped by LoRA"]),
        ("--modification_type selective --freeze_layers 12", ["--freeze_layers 12", "0 to 11"]),
        ("--modification_type selective --freeze_layers=-1", ["--freeze_layers", "'-1'"]),
        ("--modification_type selective --freeze_layers two", ["--freeze_layers", "'two'"]),
        ("--modification_type selective --freeze_layers 5-2", ["--freeze_layers", "'5-2'"]),
        (
            "--modification_type selective --freeze_layers 0-999999999",
            ["--freeze_layers", "999999999"],
        ),
        (
            "--modification_type selective --freeze_layers 0-11 --freeze_head",
            ["--freeze_layers", "--freeze_head"],
        ),
        ("--lora_rank 0", ["argument --lora_rank: invalid int >= 1", "'0'"]),
        ("--dropout 1.5", ["argument --dropout: invalid float >= 0 and < 1", "'1.5'"]),
        ("--dropout nan", ["argument --dropout: invalid float >= 0", "'nan'"]),
        ("--lora_alpha nan", ["argument --lora_alpha: invalid float", "'nan'"]),
        ("--lora_alpha inf", ["argument --lora_alpha: invalid float", "'inf'"]),
        ("--lora_rank four", ["--lora_rank", "'four'"]),
        (
            "--from_scratch --hidden_size 100 --num_attention_heads 3",
            ["--from_scratch", "100", "num_heads`: 3"],
        ),
        ("--from_scratch --num_attention_heads 0", ["--num_attention_heads", "'0'"]),
        ("--from_scratch --vocab_size -5", ["--vocab_size", "'-5'"]),
        ("--from_scratch maybe", ["--from_scratch", "'maybe'"]),
        (
            "--modification_type prefix --prefix_length 1024",
            ["--prefix_length 1024", "1024 positions"],
        ),
        (
            "--modification_type prefix --prefix_projection_size 8",
            ["--prefix_projection_size", "key_value"],
        ),
        (
            "--modification_type prefix --prefix_projection_size=-8",
            ["--prefix_projection_size", "'-8'"],
        ),
        (
            "--modification_type qlora",
            ["--modification_type", "'qlora'", "lora", "adapter", "selective"],
        ),
        ("--adapter_placement both", ["--adapter_placement", "'both'", "pfeiffer", "houlsby"]),
        ("--lora_r 4", ["--lora_r"]),
        ("--plot compared.png", ["--plot", "--compare"]),
        ("--compare --adapter_path a --merge_to b", ["--compare", "--merge_to"]),
        ("--model_name_or_path=", ["--model_name_or_path"]),
        ("--merge_to merged", ["--adapter_path", "--merge_to"]),
        ("--adapter_path final", ["--adapter_path", "--merge_to"]),
        ("--adapter_path no/such/run --merge_to no/such/merged", ["no/such/run"]),
        (
            "--model_name_or_path no/such/directory/here",
            ["--model_name_or_path no/such/directory/here"],
        ),
    ],
)
def test_a_bad_flag_is_refused_in_one_line_that_names_it(
    capsys, tmp_path, monkeypatch, flags, said
):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, flags.split())
    assert [part for part in said if part not in message] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            "--hidden_size 900000000 --num_attention_heads 1 --num_hidden_layers 1",
            "--from_scratch: ",
        ),
        ("--num_hidden_layers 2000000000", "--num_hidden_layers"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused_by_their_flag(capsys, sizes, said):
    message = refused(capsys, ["--from_scratch", *sizes.split()])
    assert said in message and ("--from_scratch" in message or "argument" in message)
    assert "model_name_or_path" not in message
