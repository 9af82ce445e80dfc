"""Rows, the files that hold them in every format, and what becomes of a file's rows."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data_pipeline
from data_pipeline import final_dataset_loader

SCRIPT = Path(data_pipeline.__file__)
EOS = 50256
COLUMNS = ["instruction", "input", "output"]
STANFORD_WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Name the colour.

### Response:"""
# Texts that a parser, a type guesser or a tokenizer might change.
TEXTS = [
    "007",
    "2020-01-01",
    "1e5",
    "NA",
    "nan",
    "null",
    "TRUE",
    "  spaces around  ",
    'a "quoted", comma',
    "two\nlines",
    "a\r\nb",
    "\ttab",
    "naïve café 😀 日本語 \u2028",
    "nul \x00 inside",
    "{braces} and %s",
    "text with <|endoftext|> in it",
    "### Response: not one",
    "[1] (a) - b",
]
ROWS = [
    {"instruction": f"Task {i}", "input": TEXTS[-i] if i % 3 else "", "output": text}
    for i, text in enumerate(TEXTS)
]


def alpaca_row(**changes):
    return {"instruction": "a", "input": "b", "output": "c", **changes}


def as_json(rows):
    return json.dumps(rows, indent=1).encode()


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    return file.getvalue()


ENCODERS = {".json": as_json, ".jsonl": as_jsonl, ".csv": as_csv}
EVERY_KIND = {**ENCODERS, ".ndjson": as_jsonl, ".parquet": as_parquet}


def run_script(*flags, cwd, encoding="utf-8", **variables):
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode("utf-8")


def ids(dataset):
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


def batch_of(path, tokenizer, **settings):
    """All rows of a file in one batch, in the file's order."""
    fixed = {"batch_size": 1000, "num_workers": 0, "shuffle": False, "padding": "longest"}
    (batch,) = final_dataset_loader(path, tokenizer=tokenizer, **{**fixed, **settings})
    return batch


def rounded_up(length):
    """The width of a batch whose longest row has so many tokens."""
    return math.ceil(length / 8) * 8


def row_of(path, tokenizer, **settings):
    """The ids and labels of a file's only row, once its padding is seen to be right and cut off."""
    batch = batch_of(path, tokenizer, **settings)
    assert batch["input_ids"].shape[0] == 1
    ids, labels, mask = (batch[name][0] for name in ("input_ids", "labels", "attention_mask"))
    length = int(mask.sum())
    assert mask.tolist() == [1] * length + [0] * (rounded_up(length) - length)
    assert (ids[length:] == EOS).all() and (labels[length:] == -100).all()
    return ids[:length], labels[:length]


def expected_row(reference, texts):
    instruction, given_input, output = texts
    return [*reference(f"{instruction}\n{given_input}\n"), *reference(output), EOS]


def run_main(capsys, *flags):
    assert data_pipeline.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out
