"""The split leaves no row on both sides, and the content hash changes with anything that training sees.

python -m pytest tests/pipeline/test_split_and_hash.py
"""

import numpy as np
import pytest
import torch
from row_files import ROWS, batch_of, ids

from data_pipeline import load_dataset


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
