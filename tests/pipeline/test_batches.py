"""Batches hold every row once an epoch, padded no wider than they must be, and the same ones whenever
and by however many processes they are drawn.

    python -m pytest tests/pipeline/test_batches.py
"""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_files import EOS, ROWS, rounded_up

from data_pipeline import (
    BUNDLED_SAMPLE,
    GlobalBatches,
    PadBatch,
    final_dataset_loader,
    load_dataset,
)


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
