"""Conversations: every turn of the assistant, and its end of text, carries labels, and nothing else does.

python -m pytest tests/pipeline/test_turns.py
"""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from row_files import EOS, alpaca_row, ids

import data_pipeline
from data_pipeline import load_dataset


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
        (
            {"messages": []},
            "expected a list of turns under 'messages' or 'conversations', got None",
        ),
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
            "turn 2: 'tool_calls' is a part of the answer that is not supported",
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


def answered(**fields):
    """A first answer with these fields, and one that is learned."""
    first = {"role": "assistant", "content": "BAD", **fields}
    return {"messages": [*turns("u:One?"), first, *turns("u:Two?|a:Good.")]}


@pytest.mark.parametrize("name", ["weight", "train", "training", "trainable", "loss"])
@pytest.mark.parametrize("mark", [False, 0, 0.0, "0", "false", "False", -1, -0.5, "-1", ".0"])
def test_an_answer_that_is_marked_carries_no_label(write, tokenizer, name, mark):
    """Its tokens stay what they are."""
    marked, plain = (
        load_dataset(write([answered(**mark)]), tokenizer, text_format="messages")
        for mark in ({name: mark}, {})
    )
    assert ids(marked) == ids(plain)
    expected = spelled(plain, tokenizer).replace(f"[[BAD{END}]]", f"BAD{END}")
    assert spelled(marked, tokenizer) == expected and "[[Good." in expected


@pytest.mark.parametrize("mark", [True, 1, 1.0, "1", "true", None])
def test_a_mark_of_an_answer_that_is_learned_says_nothing_new(write, tokenizer, mark):
    plain, marked = (
        load_dataset(write([answered(**fields)]), tokenizer, text_format="messages").content_hash()
        for fields in ({}, {"weight": mark, "train": mark})
    )
    assert marked == plain


def test_a_mark_of_a_users_turn_says_nothing_new(write, tokenizer):
    """As SlimOrca's rows are; whatever its value."""
    expected = load_dataset(write([ALPACA_TURNS]), tokenizer, text_format="messages")
    for mark in (0, 1, 0.5, False, "no"):
        row = copy.deepcopy(ALPACA_TURNS)
        row["messages"][0]["weight"] = mark
        dataset = load_dataset(write([row]), tokenizer, text_format="messages")
        assert dataset.content_hash() == expected.content_hash()


@pytest.mark.parametrize("mark", [0.5, 2, "half", "1e9", [0]])
def test_a_weight_between_or_beyond_is_refused(refused, write, mark):
    path = write([ALPACA_TURNS, answered(weight=mark)])
    error = refused("--dataset_path", path, "--text_format", "messages")
    assert f"row 2: turn 2: weight is {mark!r}: it is learned (1) or not (0)" in error


@pytest.mark.parametrize(
    "name", ["reasoning_content", "reasoning", "thinking", "function_call", "tool_calls"]
)
def test_a_part_of_an_answer_that_nobody_reads_is_refused(refused, write, tokenizer, name):
    path = write([answered(**{name: "because"})])
    error = refused("--dataset_path", path, "--text_format", "messages")
    assert f"row 1: turn 2: {name!r} is a part of the answer that is not supported" in error
    for nothing in (None, "", []):
        path = write([answered(**{name: nothing})])
        assert len(load_dataset(path, tokenizer, text_format="messages")) == 1


def test_parts_of_text_are_joined(write, tokenizer):
    plain = [{"messages": turns("u:One two?|a:Three.")}]
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two?", "image_url": None}]
    split = [{"messages": [{"role": "user", "content": parts}, *turns("a:Three.")]}]
    one, other = (
        load_dataset(write(rows), tokenizer, text_format="messages") for rows in (plain, split)
    )
    assert one.content_hash() == other.content_hash()


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": "x"}, {"type": "text"}, {"text": "x"}, "x", None]
)
def test_a_part_that_is_no_text_is_refused(refused, write, part):
    content = [{"type": "text", "text": "What is this?"}, part]
    path = write([{"messages": [{"role": "user", "content": content}, *turns("a:It.")]}])
    error = refused("--dataset_path", path, "--text_format", "messages")
    assert "row 1: turn 1: the content is [" in error and error.endswith("not text")


@pytest.mark.parametrize("blank", ["", " ", "\n", " \t\n"])
def test_a_blank_answer_has_nothing_to_learn(write, tokenizer, blank):
    rows = [{"messages": turns(f"u:One?|a:{blank}|u:Two?|a: Good.")}]
    dataset = load_dataset(write(rows), tokenizer, text_format="messages")
    shown = spelled(dataset, tokenizer)
    assert f"### Response:{blank}{END}" in shown and f"[[ Good.{END}]]" in shown
    assert shown.count("[[") == 1


def test_a_prompt_that_ends_in_an_answer_asks_for_it(tokenizer):
    """Rows of held-out conversations are prompts as they are."""
    encode = data_pipeline.encode_prompt
    asked = encode({"messages": turns("u:One?|a:1|u:Two?")}, "messages", tokenizer)
    assert encode({"messages": turns("u:One?|a:1|u:Two?|a:2")}, "messages", tokenizer) == asked
    share_gpt = {"conversations": turns("u:One?|a:1|u:Two?|a:2", **SHARE_GPT)}
    assert encode(share_gpt, "messages", tokenizer) == asked


def test_share_gpts_system_beside_the_turns_and_mixed_keys_are_read():
    beside = {"system": "Be brief.", "conversations": turns("u:a|a:b", **SHARE_GPT)}
    mixed = {"conversations": [
        {"role": "system", "value": "Be brief."}, {"from": "user", "content": "a"},
        {"role": "assistant", "value": "b"},
    ]}  # fmt: skip
    expected = {"messages": turns("s:Be brief.|u:a|a:b")}
    read = data_pipeline.read_turns
    assert read(beside) == read(mixed) == read(expected)


def test_a_column_that_is_called_messages_fills_in_a_template(write, tokenizer, reference):
    path = write([{"messages": "Hi."}])
    assert ids(load_dataset(path, tokenizer, text_format="||{messages}")) == [
        [*reference("Hi."), EOS]
    ]
