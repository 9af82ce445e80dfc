"""The script says what it did with a dataset, shows a row's round trip and leaves with the right status.

python -m pytest tests/pipeline/test_pipeline_script.py
"""

import json
import logging
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from row_files import ROWS, SCRIPT, alpaca_row, run_main, run_script
from tokenizers import normalizers

import data_pipeline
from data_pipeline import BUNDLED_SAMPLE, final_dataset_loader, load_dataset, load_tokenizer


def test_the_script_says_what_it_did_with_the_bundled_sample(tmp_path):
    rows = json.loads(BUNDLED_SAMPLE.read_text(encoding="utf-8"))
    status, out, err = run_script("--plot", "lengths.png", cwd=tmp_path)
    assert status == 0 and "Traceback" not in err and "error" not in err.lower()
    lines = out.splitlines()
    for line in (
        f"INFO:root:Dataset loaded successfully with {len(rows)} entries.",
        "INFO:root:Dataset columns: ['instruction', 'input', 'output']",
        f"INFO:root:Tokenization complete with shape: torch.Size([{len(rows)}, 512])",
        "INFO:root:DataLoader created with batch size 8 and 4 workers.",
        "INFO:root:Batch - input_ids shape: torch.Size([8, 512])",
        "INFO:root:Batch - labels shape: torch.Size([8, 512])",
    ):
        assert line in lines
    assert f"{math.ceil(len(rows) / 8)}" in next(line for line in lines if "Batches" in line)
    for row in rows[:5]:
        assert (
            f"Original Text: {row['output']}\n" in out
            and f"Detokenized Text: {row['output']}\n" in out
        )
        assert row["instruction"][:30] in out
    assert out.count("Tokenized (IDs): [") == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png"]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_terminal_that_cannot_show_the_text_gets_it_without(write, tmp_path):
    path = write([alpaca_row(instruction="日本語", output="smile 😀 café")], "naïve.json")
    status, out, err = run_script(
        "--dataset_path", path, "--num_workers", 0, cwd=tmp_path, encoding="cp1252"
    )
    assert status == 0 and err == ""
    assert "smile  café" in out and "Batch - input_ids shape: torch.Size([1, 512])" in out


@pytest.mark.skipif(os.name == "nt", reason="needs a shell's pipes")
def test_output_that_nobody_reads_ends_without_a_word_of_complaint(tmp_path):
    command = [sys.executable, str(SCRIPT), "--num_workers", "0"]
    pipeline = ["sh", "-c", '{ "$@"; echo "status $?" >&2; } | head -1', "sh", *command]
    done = subprocess.run(pipeline, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout == "INFO:root:Dataset loaded successfully with 400 entries.\n"
    assert done.stderr in ("status 141\n", "status 0\n")  # 141: ended by SIGPIPE


def test_the_process_leaves_with_2_and_one_line(tmp_path):
    status, out, err = run_script("--dataset_path", "missing.json", "--plot", "a.png", cwd=tmp_path)
    assert (status, out) == (2, "") and list(tmp_path.iterdir()) == []
    assert (
        err.startswith("data_pipeline.py: error: --dataset_path missing.json: ")
        and len(err.splitlines()) == 1
    )


def test_the_round_trip_is_counted_over_the_whole_set(write, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    rows = [alpaca_row(output=f"fine {i}") for i in range(1_500)]
    rows[3], rows[1_200], rows[1_499] = (
        alpaca_row(output=""),
        alpaca_row(output="a" + " a" * 15),
        alpaca_row(output=""),
    )
    out = run_main(capsys, "--dataset_path", write(rows), "--max_length", 16, "--num_workers", 0)
    assert "Dataset loaded successfully with 1500 entries." in out
    counted = next(line for line in out.splitlines() if "Round trip" in line)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", counted)]
    assert numbers == [
        1_499,
        1_500,
        1,
        16,
        2,
    ]  # row 1,200 is 16 tokens long and loses its end of text alone
    assert "Batches in an epoch: 188" in out  # every row is kept
    assert "Batch - input_ids shape: torch.Size([8, 16])" in out


@pytest.mark.parametrize("blank", ["", " "])
def test_a_sample_of_megabytes_is_shown_cut(write, capsys, monkeypatch, tokenizer, blank):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    path = write([alpaca_row(output=f"{blank}word" * 200_000), alpaca_row()])
    out = run_main(capsys, "--dataset_path", path, "--max_length", 100_000, "--num_workers", 0)
    assert max(map(len, out.splitlines())) < 5_000 and len(out) < 25_000
    length = len("Original Text: ") + len(f"{blank}word") * 200_000
    assert f"({length:,} characters)" in out


def test_a_tokenizer_that_changes_the_text_is_found_out(write, caplog, tokenizer):
    lossy = load_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output="UPPER"), alpaca_row(output="lower")]), lossy)
    assert any("1 of 2 rows" in record.getMessage() for record in caplog.records)
    assert any(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(
    "flags, batches",
    [([], 5), (["--eval_fraction", 0.25], 4), (["--max_samples", 9], 3), (["--batch_size", 18], 1)],
)
def test_flags_choose_the_rows_of_the_batches(
    write, capsys, monkeypatch, tokenizer, flags, batches
):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    out = run_main(
        capsys, "--dataset_path", write(ROWS), "--batch_size", 4, "--num_workers", 0, *flags
    )
    assert f"Batches in an epoch: {batches}" in out


def test_the_closing_table_counts_duplicates_and_rows_on_both_sides(write, capsys):
    """Seven rows of one text, another held out beside one that training sees."""
    row, other = alpaca_row(output="a b"), alpaca_row(output="c")
    rows, held_out = write([row] * 7), write([row, other], "held_out.json")
    shown = run_main(
        capsys, "--dataset_path", rows, "--eval_dataset_path", held_out, "--num_workers", 0
    )
    table = dict(re.findall(r"^([a-z][\w -]+?) {2,}(\S+)$", shown, re.MULTILINE))
    assert table["rows"] == "7" and table["duplicate rows"] == "6"
    assert table["held-out rows also trained on"] == "1"
    assert table["padding at longest of batch"] == "62.5%"  # three tokens of eight
    assert table["tokens"] == "21" and table["tokens with a label"] == "14"
    assert "Labels, in [[ ]]: a[[ b<|endoftext|>]]" in shown


def test_a_templates_escapes_mean_what_they_look_like(write, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    path = write([{"q": "why", "a": "so"}])
    out = run_main(capsys, "--dataset_path", path, "--text_format", r"Q: {q}\n\tA:|| {a}")
    assert "Original Text: Q: why\n\tA: so\n" in out


def test_the_loader_has_the_workers_and_the_seed_of_the_flags(
    write, capsys, monkeypatch, tokenizer
):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    built = []
    monkeypatch.setattr(
        data_pipeline,
        "final_dataset_loader",
        lambda *a, **k: built.append(final_dataset_loader(*a, **k)) or built[0],
    )
    run_main(capsys, "--dataset_path", write(ROWS), "--num_workers", 1, "--seed", 5)
    own = final_dataset_loader(write(ROWS), tokenizer=tokenizer, num_workers=0, seed=5)
    assert built[0].num_workers == 1
    built[0].batch_sampler.set_epoch(0)  # the script has drawn a batch of it
    assert torch.equal(next(iter(built[0]))["input_ids"], next(iter(own))["input_ids"])


def test_the_first_max_samples_rows_are_used(write, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    rows = [
        alpaca_row(output="one two three"),
        alpaca_row(output="one"),
        *[alpaca_row(output="a b c d e f")] * 8,
    ]
    out = run_main(capsys, "--dataset_path", write(rows), "--max_samples", 2, "--num_workers", 0)
    assert "Batch - 4 of 1024 positions carry a label" in out
