"""Every kind of file, packed or not, one or many, gives exactly the rows that Python's json and csv
modules read in it.

    python -m pytest tests/pipeline/test_reading_files.py
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import (
    COLUMNS,
    ENCODERS,
    EOS,
    EVERY_KIND,
    ROWS,
    STANFORD_WITHOUT_INPUT,
    alpaca_row,
    as_csv,
    as_json,
    as_jsonl,
    as_parquet,
    expected_row,
    ids,
    row_of,
)

import data_pipeline
from data_pipeline import load_dataset


def as_zst(content):
    """Two frames, as parallel compressors and `cat` write them; of unknown size, as pipes do."""
    compress = pytest.importorskip("zstandard").ZstdCompressor(write_content_size=False).compress
    return compress(content[:9]) + compress(content[9:])


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": as_zst,
}


def test_a_link_to_a_directory_above_gives_no_file_twice(directory, tokenizer):
    path = directory({"a/rows.json": ROWS})
    (path / "a" / "up").symlink_to(path)
    (path / "b.json").symlink_to(path / "a" / "rows.json")
    assert len(load_dataset(path, tokenizer)) == len(ROWS)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "ROWS.JSON"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_format_gives_the_same_rows_with_or_without_a_byte_order_mark(
    write, tokenizer, reference, name, mark
):
    content = ENCODERS[Path(name).suffix.lower()](ROWS)
    dataset = load_dataset(
        write(mark + content, name), tokenizer, text_format="{instruction}|{input}||{output}"
    )
    assert ids(dataset) == [
        [*reference(f"{row['instruction']}|{row['input']}"), *reference(row["output"]), EOS]
        for row in ROWS
    ]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_file_gives_the_same_rows_packed_or_not(write, tokenizer, kind, packing):
    template = "{instruction}|{input}||{output}"
    expected = load_dataset(write(ROWS), tokenizer, text_format=template).content_hash()
    path = write(PACKERS[packing](EVERY_KIND[kind](ROWS)), f"more.v2{kind}{packing}")
    assert load_dataset(path, tokenizer, text_format=template).content_hash() == expected


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("left", [0.01, 0.4, 0.7, 0.99])
def test_a_packed_file_that_is_cut_short_is_refused(refused, write, packing, left):
    """zstandard's own readers end quietly where the file does, here after whole lines: a block of
    131,072 bytes holds 512."""
    hidden = len(as_jsonl([alpaca_row(output="")]))
    texts = (os.urandom(128).hex()[: 256 - hidden] for _ in range(1024))
    content = as_jsonl([alpaca_row(output=text) for text in texts])
    assert len(content) == 2 * 131_072
    zst = pytest.importorskip("zstandard").compress
    packed = {**PACKERS, ".zst": zst}[packing](content)
    path = write(packed[: int(left * len(packed))], f"rows.jsonl{packing}")
    error = refused("--dataset_path", path)
    assert error.startswith(f"--dataset_path {path}: ") and re.search("end|Truncated", error)


def test_a_packed_file_that_is_damaged_is_refused(refused, write):
    for packing in (".gz", ".bz2", ".xz", ".zst"):
        packed = bytearray(PACKERS[packing](as_jsonl(ROWS)))
        packed[30:60] = bytes(30)
        path = write(bytes(packed), f"rows.jsonl{packing}")
        assert refused("--dataset_path", path).startswith(f"--dataset_path {path}: ")


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("a.parquet", "pyarrow.parquet", "pyarrow"),
        ("a.jsonl.zst", "pyarrow", "pyarrow"),
        ("a.parquet.zst", "pyarrow", "pyarrow"),
    ],
)
def test_a_package_that_a_file_needs_is_named(refused, write, monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    path, needed = write(b"", name), f": pip install {package}"
    error = refused("--dataset_path", path)
    assert error.startswith(f"--dataset_path {path}: ") and error.endswith(needed)


def test_a_nulls_and_numbers_of_parquet_are_told_from_text(refused, write, tokenizer):
    rows = [alpaca_row(input=None), alpaca_row(input="NA")]
    path = write(as_parquet(rows), "a.parquet")
    expected = load_dataset(write([alpaca_row(input=""), rows[1]]), tokenizer, text_format="alpaca")
    dataset = load_dataset(path, tokenizer, text_format="alpaca")
    assert dataset.content_hash() == expected.content_hash()
    numbers = write(as_parquet([{**alpaca_row(), "output": 7}]), "numbers.parquet")
    assert refused("--dataset_path", numbers).endswith("row 1: 'output' is 7, not text")


def without_input(rows):
    return [{name: row[name] for name in ("instruction", "output")} for row in rows]


def test_a_row_without_an_input_is_one_with_an_empty_input(write, tokenizer):
    rows = [row | {"input": ""} for row in ROWS]
    expected = load_dataset(write(rows), tokenizer, text_format="alpaca").content_hash()
    table = [["instruction", "output"], *(list(row.values()) for row in without_input(rows))]
    file = io.StringIO(newline="")
    csv.writer(file).writerows(table)
    for name, content in {
        "mixed.json": as_json([*rows[:4], *without_input(rows[4:])]),
        "none.jsonl": as_jsonl(without_input(rows)),
        "none.csv": file.getvalue().encode(),
        "none.parquet": as_parquet(without_input(rows)),
    }.items():
        dataset = load_dataset(write(content, name), tokenizer, text_format="alpaca")
        assert dataset.content_hash() == expected


def test_only_alpacas_input_may_be_missing(refused, write):
    path = write(as_json([alpaca_row(), {"output": "a"}]))
    assert refused("--dataset_path", path).endswith(
        "row 2: no 'instruction'; the row has ['output']"
    )
    path = write(as_json([{"question": "a", "output": "b"}]))
    error = refused("--dataset_path", path, "--text_format", "{input}||{output}")
    assert "row 1: no 'input'; the row has ['output', 'question']: --text_format" in error


@pytest.mark.parametrize("end", [",,", ", ,", ",,,,,,"])
def test_empty_columns_that_a_spreadsheet_appends_are_no_columns(write, tokenizer, end):
    rows = f"instruction,input,output,,\nSay.,,It is.{end}\n\nSay.,,So.,,\n,,,,\n".encode()
    expected = [alpaca_row(output=text) for text in ("It is.", "So.", "")]
    dataset = load_dataset(write(rows, "excel.csv"), tokenizer)
    assert dataset.content_hash() == load_dataset(write(expected), tokenizer).content_hash()


@pytest.mark.parametrize("header", ["instruction,input,output", "instruction,input,output,,"])
def test_a_field_under_no_name_is_refused_by_its_row(refused, write, header):
    rows = f"{header}\na,b,c,\na,b,c,,note\n".encode()
    error = refused("--dataset_path", write(rows, "excel.csv"))
    assert error.endswith("excel.csv: row 2: more fields than the header names")


def test_a_quote_that_is_not_doubled_is_refused_by_its_line(refused, write):
    rows = b'instruction,input,output\na,"two\nlines",c\na,,"It "is" it."\na,b,c\n'
    error = refused("--dataset_path", write(rows, "quote.csv"))
    assert "quote.csv: line 4: " in error and "written twice" in error


@pytest.mark.parametrize("encode", [as_csv, as_jsonl, as_json])
@pytest.mark.parametrize("row, byte", [(1, "0xe9"), (30, "0x80"), (15_000, "0xe9")])
def test_a_byte_that_is_not_utf8_is_refused_by_its_row(
    refused, write, tokenizer, encode, row, byte
):
    """As Windows writes it; in a column that is not read it does no harm."""
    rows = [alpaca_row(output="fine") for _ in range(row + 3)]
    rows[row - 1] = alpaca_row(input="M\nARK")
    content = encode(rows).replace(b"ARK", bytes([int(byte, 16)]))
    path = write(content, {as_csv: "a.csv", as_jsonl: "a.jsonl", as_json: "a.json"}[encode])
    error = refused("--dataset_path", path, "--text_format", "alpaca")
    at = f"'input' holds '\\udc{byte[2:]}' at character 2"
    assert error == f"--dataset_path {path}: row {row}: {at}: save the file as UTF-8"
    assert len(load_dataset(path, tokenizer, text_format="||{output}")) == len(rows)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", json.dumps({"data": ROWS}, indent=2).encode(), "save its list 'data' alone"),
        ("a.json", json.dumps({"data": ROWS}).encode(), "row 1: no 'instruction'; the row has"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        ("a.parquet", as_json(ROWS), "not a parquet file"),
        ("a.parquet", b"", "Parquet"),
        ("a.json", b'{"data": [\n{"instruction": "a"}\n]}\n', "save its list 'data' alone"),
        ("a.jsonl", b'{"output": "a",\n{"output": "b"}\n', "line 1: invalid JSON"),
        ("a.csv", as_csv(ROWS).decode().encode("utf-16-le"), "is UTF-16, or packed"),
        ("a.json", as_json(ROWS).decode().encode("utf-16"), "is UTF-16, or packed"),
        ("a.jsonl", gzip.compress(as_jsonl(ROWS)), "is UTF-16, or packed"),
        ("a.csv", as_zst(as_csv(ROWS)), "save the file as UTF-8"),
        ("a.json", as_parquet(ROWS), "in UTF-8"),
        ("a.jsonl", as_jsonl([{"messages": []}]), "rows of turns need --text_format messages"),
        ("a.csv", b"instruction, Input ,output\na,b,c\n", "' Input ' must be named 'input'"),
        ("a.json", as_json([alpaca_row(output="\ud83d")]), "half of a surrogate pair"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_told(refused, write, name, content, said):
    path = write(content, name)
    error = refused("--dataset_path", path)
    assert error.startswith(f"--dataset_path {path}: ") and said in error and len(error) < 500


def test_a_glob_is_the_rows_of_its_files_in_order(directory, write, tokenizer):
    """Of all kinds, with other columns beside those that are read, without an input or with it."""
    files = {
        "a.csv": ROWS[:3],
        "b/part-1.jsonl": [row | {"id": 7} for row in ROWS[3:5]],
        "b/part-2.jsonl": ROWS[5:6],
        "c.parquet": without_input(ROWS[:2]),
        "d.json.gz": gzip.compress(as_json(ROWS[6:])),
    }
    path = directory(files)
    without = [row | {"input": ""} for row in ROWS[:2]]
    expected = write([*ROWS[:6], *without, *ROWS[6:]])
    template = "{instruction}|{input}||{output}"
    hashes = {
        load_dataset(where, tokenizer, text_format=template).content_hash()
        for where in (expected, f"{path}/**/*.*")
    }
    assert len(hashes) == 1
    alone = load_dataset(f"{path}/b/part-[12].*", tokenizer, text_format=template)
    assert len(alone) == 3


def test_a_fault_in_one_of_several_files_is_told_by_that_file(refused, directory):
    files = {"a.csv": as_csv(ROWS), "b.csv": b"question,answer\na,b\n", "c.csv": as_csv(ROWS)}
    path = directory(files)
    for where in (path, f"{path}/*"):
        start = f"--dataset_path {path}/b.csv: row 1: no 'instruction'"
        assert refused("--dataset_path", where).startswith(start)
    directory({"b.csv": b""})
    assert refused("--dataset_path", path) == f"--dataset_path {path}/b.csv: holds no rows"


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"a"}])
def test_a_glob_without_rows_is_refused(refused, directory, files):
    path = directory({"README.md": b""} | files)
    for where in (f"{path}/*.txt", f"{path}/none*.json"):
        assert refused("--dataset_path", where).startswith(f"--dataset_path {where}: holds no ")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_columns_separated_otherwise_are_told_from_the_header(
    write, tokenizer, caplog, separator, mark
):
    """As spreadsheets save them in Europe, also in the columns of a template."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    path = write(mark + text.getvalue().encode(), "rows.tsv" if separator == "\t" else "rows.csv")
    expected = load_dataset(write(ROWS), tokenizer, text_format="alpaca").content_hash()
    with caplog.at_level(logging.INFO):
        assert load_dataset(path, tokenizer, text_format="alpaca").content_hash() == expected
    assert f"The columns are separated by {separator!r}" in caplog.text


def test_a_comma_separates_where_a_name_holds_another_sign(write, tokenizer, caplog):
    path = write(b'"q; or prompt",a\nwhy; how,so\n', "rows.csv")
    with caplog.at_level(logging.INFO):
        row = load_dataset(path, tokenizer, text_format="{q; or prompt}||{a}")[0]
    assert tokenizer.decode(row["input_ids"]) == "why; howso<|endoftext|>"
    assert "separated" not in caplog.text


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", b"instruction,output,input\na,b,c\na,b\n", "row 2: fewer fields"),
        ("a.csv", b"instruction;output\na;b;c\n", "row 1: more fields"),
        ("a.tsv", b"instruction\toutput\na\n", "row 1: fewer fields"),
        ("a.xlsx", b"PK\x03\x04", "save an .xlsx sheet as .csv"),
        ("a.XLS", b"\xd0\xcf", "save an .xlsx sheet as .csv"),
        ("a.jsonl", b"/annex/objects/SHA256E-s1--0\n", "git annex get"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_a_file_that_would_lose_rows_or_fields_is_refused(refused, write, name, content, said):
    path = write(content, name)
    error = refused("--dataset_path", path)
    assert error.startswith(f"--dataset_path {path}: ") and said in error


def test_a_field_of_200_kb_is_read_whole(write, tokenizer):
    text = "word " * 40_000
    path = write(as_csv([alpaca_row(output=text)]), "long.csv")
    dataset = load_dataset(path, tokenizer, max_length=100_000)
    assert tokenizer.decode(dataset[0]["input_ids"][:-1]) == text


@pytest.mark.parametrize("where", ["{path}", "{path}/*.jsonl"])
def test_a_link_to_nothing_is_refused(refused, directory, where):
    """As git-annex and DVC leave a file that was not fetched."""
    path = directory({"a.jsonl": ROWS})
    (path / "b.jsonl").symlink_to(path / ".git" / "annex" / "SHA256E-s1--0")
    error = refused("--dataset_path", where.format(path=path))
    assert f"{path}/b.jsonl is a link to nothing" in error


@pytest.mark.parametrize("where", ["{path}", "{path}/*"])
def test_the_same_rows_packed_and_unpacked_are_refused(refused, directory, where):
    path = directory({"train.jsonl": ROWS, "train.jsonl.gz": gzip.compress(as_jsonl(ROWS))})
    error = refused("--dataset_path", where.format(path=path))
    assert error.endswith(f"{path}/train.jsonl is there packed and unpacked")


@pytest.mark.parametrize(
    "columns, hint",
    [
        (["answer", "question"], "'Q: {question}\\nA:|| {answer}'"),
        (["prompt", "completion"], "'Q: {prompt}\\nA:|| {completion}'"),
        (["first", "second"], "'Q: {first}\\nA:|| {second}'"),
    ],
)
def test_other_columns_are_told_with_a_format_that_reads_them(refused, write, columns, hint):
    """The command that the hint gives works."""
    path = write(as_json([dict.fromkeys(columns, "x")]))
    error = refused("--dataset_path", path)
    assert error.endswith(
        f"row 1: no 'instruction'; the row has {sorted(columns)}: --text_format {hint}"
    )
    legal = data_pipeline.legal_format(hint.strip("'"))
    assert len(load_dataset(path, text_format=legal)) == 1


def far_dates(pyarrow):
    return pyarrow.array([10**18], pyarrow.timestamp("us"))


def a_strange_zone(pyarrow):
    return pyarrow.array([0], pyarrow.timestamp("us", "Custom/Zone"))


def bytes_that_are_no_text(pyarrow):
    parts = [None, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"caf\xe9")]
    return pyarrow.Array.from_buffers(pyarrow.string(), 1, parts)


@pytest.mark.parametrize("column", [far_dates, a_strange_zone, bytes_that_are_no_text])
@pytest.mark.parametrize("text_format", ["alpaca", "messages"])
def test_parquet_columns_that_the_format_does_not_read_are_not_read(
    tmp_path, tokenizer, column, text_format
):
    pyarrow = pytest.importorskip("pyarrow")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    columns = {"instruction": ["a"], "output": ["b"], "messages": [turns]}
    table = pyarrow.table(columns | {"unread": column(pyarrow)})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "rows.parquet")
    dataset = load_dataset(tmp_path / "rows.parquet", tokenizer, text_format=text_format)
    assert dataset.label_counts.tolist() == [2]


def test_fields_that_nobody_reads_may_change_their_type(write, tokenizer):
    unread = [1, "one", None, [1], {"a": "\ud800"}, 1e999, True]
    rows = [row | {"unread": value} for row, value in zip(ROWS, unread, strict=False)]
    content = "\n".join(map(json.dumps, rows)).encode()
    expected = load_dataset(write(ROWS[: len(rows)]), tokenizer).content_hash()
    assert load_dataset(write(content, "rows.jsonl"), tokenizer).content_hash() == expected


def test_a_file_whose_name_reads_as_a_glob_is_that_file(write, tokenizer):
    assert len(load_dataset(write(ROWS, "rows [1].json"), tokenizer)) == len(ROWS)


def test_json_lines_and_arrays_are_told_by_how_they_begin(write, tokenizer):
    expected = load_dataset(write(ROWS), tokenizer).content_hash()
    lines = as_jsonl(ROWS).replace(b"\n", b"\r\n\r\n")
    assert load_dataset(write(lines, "lines.json"), tokenizer).content_hash() == expected
    assert load_dataset(write(lines, "lines.jsonl"), tokenizer).content_hash() == expected
    array = b"\n " + as_json(ROWS)
    assert load_dataset(write(array, "array.jsonl"), tokenizer).content_hash() == expected


@given(
    rows=st.lists(
        st.fixed_dictionaries({column: st.text(max_size=12) for column in COLUMNS}),
        min_size=1,
        max_size=3,
    ),
    suffix=st.sampled_from(list(ENCODERS)),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_text_at_all_is_read_back_unchanged(
    tmp_path_factory, tokenizer, reference, rows, suffix
):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(ENCODERS[suffix](rows))
    dataset = load_dataset(path, tokenizer, text_format="{instruction}\n{input}\n||{output}")
    assert ids(dataset) == [
        expected_row(reference, [row[column] for column in COLUMNS]) for row in rows
    ]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_null_input_is_empty(write, tokenizer, value):
    row = {"instruction": "Name the colour.", "input": value, "output": "Yellow."}
    for name, content in (("a.json", json.dumps([row])), ("a.jsonl", json.dumps(row))):
        tokens, _ = row_of(write(content.encode(), name), tokenizer, text_format="alpaca")
        assert tokenizer.decode(tokens) == STANFORD_WITHOUT_INPUT + "Yellow.<|endoftext|>"


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b'[{"instruction": "", "input": "", "output": "old", "output": "new"}]'),
        (
            "a.json",
            b'[{"instruction": "", "input": "", "output": "new", '
            b'"other": [1e999, {"deep": null}]}]',
        ),
        (
            "a.json",
            b'[{"instruction": "", "input": "", "output": "new", "id": ' + b"9" * 400 + b"}]",
        ),
        (
            "a.json",
            b'[{"instruction": "", "input": "", "output": "new", '
            b'"not read": "half a pair \\ud800"}]',
        ),
        ("a.json", b'\n\n [{"instruction":"","input":"","output":"n\\u0065w"}] \n'),
        ("a.jsonl", b'\n{"instruction": "", "input": "", "output": "new"}\n\n  \n'),
        ("a.csv", b'output,"input",instruction,extra\r\n\r\nnew,,,17\r\n'),
        ("a.csv", b'instruction,input,output\n,,"new"'),
    ],
)
def test_odd_but_valid_files_are_read(write, tokenizer, reference, name, content):
    assert ids(load_dataset(write(content, name), tokenizer)) == [[*reference("new"), EOS]]


def test_a_long_file_is_read_like_a_short_one(write, tokenizer, reference):
    """Rows are read in chunks: none is lost at a seam, and they are counted on."""
    rows = [{"instruction": "", "input": "", "output": f"n{i}"} for i in range(10_003)]
    dataset = load_dataset(write(rows, "long.csv"), tokenizer)
    assert len(dataset) == 10_003
    assert ids(dataset)[9_999:10_001] == [[*reference(f"n{i}"), EOS] for i in (9_999, 10_000)]
    lines = as_jsonl(rows)
    assert (
        load_dataset(write(lines, "long.jsonl"), tokenizer).content_hash() == dataset.content_hash()
    )
    with pytest.raises(ValueError, match="row 10004"):
        load_dataset(write(lines + as_jsonl([alpaca_row(output=7)]), "long.jsonl"), tokenizer)


@pytest.mark.parametrize("name", ["long.csv", "long.jsonl"])
def test_a_half_read_file_turns_no_warning_of_others_into_an_error(write, name):
    path = write([alpaca_row()] * 20_001, name)
    with pytest.warns(UserWarning, match="of a library"):
        for _ in itertools.islice(data_pipeline.read_rows(path, "alpaca"), 10_500):
            pass
        warnings.warn("of a library", UserWarning, stacklevel=1)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("indent", [1, None])
def test_rows_that_are_wrapped_in_an_object_are_told_by_its_list(tmp_path, name, indent):
    path = tmp_path / name
    path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=indent))
    with pytest.raises(ValueError, match=r"row 1: no 'instruction'.*; save its list 'data' alone"):
        load_dataset(path)
