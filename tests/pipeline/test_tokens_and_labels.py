"""A row becomes exactly the tokens, masks and labels that it should; token ids are checked against
transformers' own GPT-2 tokenizer.

    python -m pytest tests/pipeline/test_tokens_and_labels.py
"""

import copy
import functools
import json
import os
import runpy

import pytest
from row_files import EOS, ROWS, SCRIPT, STANFORD_WITHOUT_INPUT, batch_of, ids, rounded_up, row_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline import (
    BUNDLED_SAMPLE,
    encoder_for,
    final_dataset_loader,
    load_dataset,
    load_tokenizer,
)

STANFORD_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that \
provides further context. Write a response that appropriately completes the request.

### Instruction:
Name the colour.

### Input:
a ripe lemon

### Response:"""


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
