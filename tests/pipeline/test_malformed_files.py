"""A malformed file is read as Python reads it or refused in one line that names its row, with nothing
written.

    python -m pytest tests/pipeline/test_malformed_files.py
"""

import csv
import io
import json
import os
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from row_files import (
    COLUMNS,
    ENCODERS,
    ROWS,
    alpaca_row,
    as_csv,
    as_json,
    as_jsonl,
    expected_row,
    ids,
)

from data_pipeline import load_dataset


def checked(rows):
    """The three texts of every row as Python's parser gave them; None where one must be refused."""
    texts = []
    for row in rows:
        if not isinstance(row, dict) or None in row:
            return None
        row = {"input": "", **row}
        if row["input"] is None or row["input"] != row["input"]:
            row["input"] = ""
        if not all(isinstance(row.get(column), str) for column in COLUMNS):
            return None
        texts.append([row[column] for column in COLUMNS])
        if any("\ud800" <= character <= "\udfff" for text in texts[-1] for character in text):
            return None
    return texts or None


def readings(suffix, data):
    """What Python's json and csv modules make of the bytes: the acceptable readings, none for a
    file that must be refused."""
    text = data.decode("utf-8-sig", "surrogateescape")  # `checked` refuses what is not UTF-8

    def lines(pattern):
        return [json.loads(line) for line in re.split(pattern, text) if line.strip()]

    if suffix == ".csv":
        attempts = [lambda: list(csv.DictReader(io.StringIO(text, newline="")))]
    elif text.lstrip().startswith("["):
        attempts = [lambda: json.loads(text)]
    else:
        attempts = [lambda: lines("\n"), lambda: lines("\r\n|\r|\n"), lambda: [json.loads(text)]]
    found = []
    for attempt in attempts:
        try:
            rows = attempt()
        except (ValueError, RecursionError, csv.Error):
            continue
        found.append(checked(rows) if isinstance(rows, list) else None)
    return [reading for reading in found if reading]


PIECES = [
    *(
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5_000,
        b"true",
        b"007",
        b'"\\ud800"',
        b'"\\ud83d\\ude00"',
        b'"\\u0000"',
    ),
    *(
        b'{"output": {}}',
        b"[" * 500,
        b"[" * 100_000,
        b'{"a":' * 2_000,
        b'"output": "twice", ',
        b'"input": null, ',
        b"{}",
        b"[]",
    ),
    *(
        b'"',
        b'""',
        b"'",
        b",",
        b",,,",
        b"\n",
        b"\r",
        b"\r\n",
        b"\x00",
        b"\\",
        b"{",
        b"}",
        b"]",
        b"[",
        b":",
        b" ",
        b"\t",
        b"\x1a",
    ),
    *(
        b"\xff",
        b"\xfe\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"// no\n",
        b"instruction,input,output\n",
    ),
]


@st.composite
def mutated_files(draw):
    """(suffix, bytes): a valid file of a few rows, damaged up to three times."""
    suffix = draw(st.sampled_from(list(ENCODERS)))
    words = st.sampled_from(["", "a", "007", 'q"q', "x,y", "two\nlines", "é😀", "a  b"])
    rows = draw(st.lists(st.fixed_dictionaries({column: words for column in COLUMNS}), max_size=3))
    data = draw(st.sampled_from([ENCODERS[suffix], as_json]))(rows)
    for _ in range(draw(st.integers(0, 3))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        kind = draw(
            st.sampled_from(["replace", "insert", "cut", "truncate", "repeat", "value", "encode"])
        )
        if kind == "replace" and start < len(data):
            data = data[:start] + bytes([draw(st.integers(0, 255))]) + data[start + 1 :]
        elif kind == "insert":
            data = data[:start] + draw(st.sampled_from(PIECES)) + data[start:]
        elif kind == "cut":
            data = data[:start] + data[end:]
        elif kind == "truncate":
            data = data[:start]
        elif kind == "repeat":
            data = data[:end] + data[start:]
        elif kind == "value":
            before, value, after = data.partition(
                draw(st.sampled_from([b'"a"', b'"007"', b'""', b"a", b"007"]))
            )
            data = before + (value and draw(st.sampled_from(PIECES))) + after
        elif kind == "encode":
            data = data.decode("utf-8", "replace").encode(
                draw(st.sampled_from(["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "cp1252"])),
                "replace",
            )
    return suffix, data


@given(mutated_files())
@example((".csv", b"instruction,input,output\na,b,c\nd,e\n"))
@example((".csv", b"instruction,input,output\na,b,c\nd,e,f,g\n"))
@example((".csv", b'instruction,input,output\na,b,"c\n'))
@example((".json", b'{"instruction": "a",\n "input": "", "output": "pretty"}'))
@example((".json", b'[{"instruction": "a", "input": "", "output": {"b": "c"}}]'))
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_a_malformed_file_is_read_as_python_reads_it_or_refused_in_one_line(
    tmp_path_factory, tokenizer, reference, case
):
    suffix, data = case
    path = tmp_path_factory.getbasetemp() / f"mutated{suffix}"
    path.write_bytes(data)
    template = "{instruction}\n{input}\n||{output}"
    acceptable = [
        [expected_row(reference, texts) for texts in reading] for reading in readings(suffix, data)
    ]
    try:
        rows = ids(load_dataset(path, tokenizer, text_format=template, max_length=100_000))
    except ValueError as refusal:
        assert str(path) in str(refusal) and len(str(refusal).splitlines()) == 1
    else:
        assert rows in acceptable


MISSING = [alpaca_row(), {"instruction": "a", "input": "b"}]
NESTED = b'[{"instruction": "a", "input": "b", "output": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]"
FAULTS = {
    "an empty json file": ("rows.json", b"", ""),
    "an empty jsonl file": ("rows.jsonl", b"", "no rows"),
    "an empty csv file": ("rows.csv", b"", ""),
    "an empty list": ("rows.json", b"[]", "no rows"),
    "blank lines": ("rows.jsonl", b"\n \n", "no rows"),
    "a header alone": ("rows.csv", b"instruction,input,output\n", "no rows"),
    "truncated json": ("rows.json", as_json([alpaca_row()] * 2)[:-9], "line 10"),
    "invalid json": ("rows.json", b'[\n{"instruction": "a"},\n{"instruction": oops}]', "line 3"),
    "an invalid json line": (
        "rows.jsonl",
        as_jsonl([alpaca_row()]) + b'\n{"instruction"',
        "line 3",
    ),
    "an invalid line of json lines in .json": (
        "rows.json",
        as_jsonl([alpaca_row()] * 2) + b"{oops}",
        "line 3",
    ),
    "a text at the top level": ("rows.json", b'"text"', "row 1: expected an object"),
    "a null at the top level": ("rows.json", b"null", "row 1: expected an object"),
    "rows that are lists": ("rows.json", b'[["a", "b", "c"]]', "row 1"),
    "a missing key": ("rows.json", as_json(MISSING), "row 2: no 'output'"),
    "a missing key in json lines": ("rows.jsonl", as_jsonl(MISSING), "row 2: no 'output'"),
    "a column named twice": ("rows.csv", b"instruction,input,output,output\na,b,c,d\n", "twice"),
    "a missing column": ("rows.csv", b"instruction,input\na,b\n", "no 'output'"),
    "a short csv row": ("rows.csv", b"instruction,input,output\na,b,c\nd,e\n", "2"),
    "a long csv row": ("rows.csv", b"instruction,input,output\na,b,c\nd,e,f,g\n", ""),
    "a csv that breaks off in a quote": ("rows.csv", b'instruction,input,output\na,b,"c\nd', ""),
    "a number for text": (
        "rows.json",
        as_json([alpaca_row(), alpaca_row(output=7)]),
        "row 2: 'output'",
    ),
    "a list for text": (
        "rows.json",
        as_json([alpaca_row(instruction=["a"])]),
        "row 1: 'instruction'",
    ),
    "a null output": ("rows.json", as_json([alpaca_row(output=None)]), "row 1: 'output'"),
    "bad utf-8": ("rows.json", as_json([alpaca_row()]).replace(b"a", b"\xff", 1), ""),
    "utf-16": ("rows.json", as_json([alpaca_row()]).decode().encode("utf-16"), ""),
    "utf-16 without a mark": ("rows.csv", as_csv([alpaca_row()]).decode().encode("utf-16-le"), ""),
    "utf-32": ("rows.jsonl", as_jsonl([alpaca_row()]).decode().encode("utf-32"), ""),
    "a lone surrogate": (
        "rows.json",
        as_json([alpaca_row(), alpaca_row(output="\ud800")]),
        "row 2: 'output'",
    ),
    "a number of 5,000 digits": (
        "rows.jsonl",
        as_jsonl([alpaca_row()]) + b'\n{"id": ' + b"9" * 5_000 + b"}",
        "line 3",
    ),
    "nesting 100,000 deep": ("rows.json", NESTED, "line 1: invalid JSON: maximum recursion"),
    "nesting 100,000 deep in json lines": ("rows.jsonl", NESTED[1:-1], "maximum recursion"),
    "another kind of file": ("rows.txt", as_json([alpaca_row()]), ".jsonl"),
    "a file without a suffix": ("rows", as_json([alpaca_row()]), ".jsonl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_refused_in_one_line_with_nothing_written(refused, write, fault):
    name, content, said = FAULTS[fault]
    path = write(content, name)
    error = refused("--dataset_path", path, "--plot", "lengths.png", "--num_workers", 0)
    assert error.startswith(f"--dataset_path {path}: ") and said in error.removeprefix(
        f"--dataset_path {path}: "
    )


@pytest.mark.parametrize(
    "path", ["missing.json", "directory.json", "", "a\nb.json", "x" * 5_000 + ".json"]
)
def test_a_path_that_is_no_file_is_refused(refused, tmp_path, path):
    (tmp_path / "directory.json").mkdir()
    error = refused("--dataset_path", path, "--num_workers", 0)
    assert error.removeprefix("argument ").startswith("--dataset_path")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read any file"
)
def test_an_unreadable_file_is_refused(refused, write):
    path = write(ROWS)
    path.chmod(0)
    assert str(path) in refused("--dataset_path", path)


def test_a_header_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("instruction,input,output,résumé\na,b,c,d\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"the header holds .*: save the file as UTF-8"):
        load_dataset(path)
