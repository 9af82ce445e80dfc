"""Fine-tune GPT-2 on instruction rows with LoRA, adapters, prefixes, selective freezing or in full.

    python train_llm.py --demo    # no download, a minute or two on a CPU
    python train_llm.py --dataset_path alpaca_data.json --output_dir ./outputs
    python train_llm.py --dataset_path alpaca_data.json --resume_from auto
    python train_llm.py --adapter_path outputs/best --prompt "Name a colour."
    torchrun --nproc_per_node=2 train_llm.py --dataset_path alpaca_data.json

The loop is one for all techniques: a technique only decides which parameters train.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until main: what imports make stays, and to search it for garbage over and over takes a second

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import filelock
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AttentionInterface, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import data_pipeline
import modify_llm
from data_pipeline import IGNORED, AlpacaDataset, final_dataset_loader, load_dataset, load_tokenizer, split_text
from modify_llm import SWITCH, final_modify, load_trained, save_trained, verify_directory

logger = logging.getLogger(__name__)
plain = logging.getLogger("plain")  # lines without a prefix

# From `python tests/measure.py sweep` on a 16-million-parameter GPT-2; full: a hair below the best, for larger models.
LEARNING_RATES = {"lora": 5e-3, "adapter": 5e-3, "embedding": 1e-2, "key_value": 1e-1, "selective": 1e-3, "full": 5e-4}
ROUND_TO, QUERY_BLOCK = 32, 128  # tokens
CPU_TOKENS = 1536  # of a batch at once, about: more are not faster, and their activations fill the memory
Sizes = list[tuple[int, int]]  # (n, width) of grids that lie one behind the other, n * width vectors each
OUT_OF_MEMORY = "not enough memory|[Cc]annot allocate memory|can't allocate memory|ALLOC_FAILED"  # what PyTorch says
# What may differ between a run and its continuation; all else must be equal for it to be the same run.
FREE_TO_CHANGE = {
    "dataset_path", "eval_dataset_path", "output_dir", "overwrite_output_dir", "resume_from", "num_workers", "demo",
    "log_interval", "eval_interval", "save_interval", "save_total_limit", "device", "report_to", "prompt", "eval_only",
    "num_samples", "max_new_tokens", "temperature", "model_name_or_path", "tokenizer_name_or_path", "adapter_path",
}  # fmt: skip
OWN = (  # what a run writes, and --overwrite_output_dir removes
    "run.json", "metrics.jsonl", "metrics.jsonl.new", "training_curves.png", "predictions.jsonl", "training_*.log",
    "checkpoints", "best", "final", "base", "tensorboard",
)  # fmt: skip
CARD = "README.md"  # not under the checksums: whoever publishes a model edits it


class Stopped(Exception):
    """A signal, the argument, asked for the end; a checkpoint is written."""


# ---- flags -----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_llm.py",
        description="Fine-tune GPT-2 on instruction rows.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        parents=[data_pipeline.data_flags(), modify_llm.model_flags()],
        formatter_class=modify_llm.HelpFormat,
        epilog="examples:\n" + "\n".join(__doc__.splitlines()[2:7]),
    )
    parser.set_defaults(text_format="alpaca", eval_fraction=0.05, num_workers=0)
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=3, help="passes over the training rows; >= 1 (%(default)s)")
    add("--max_steps", type=int, default=0, help="optimizer steps; 0: by --epochs (%(default)s)")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    add("--learning_rate", type=float, help=f"peak of the schedule; > 0 ({rates})")
    add("--weight_decay", type=float, default=0.01, help="AdamW's, none on 1-D parameters; >= 0 (%(default)s)")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to it; 0: off (%(default)s)")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches a step; >= 1 (%(default)s)")
    schedules = ("warmup_cosine", "cosine", "linear", "constant")
    add("--scheduler", choices=schedules, default="warmup_cosine", help="counted in optimizer steps (%(default)s)")
    add("--warmup_steps", type=int, help="of warmup_cosine and linear (100, at most 10%% of the run)")
    add("--min_lr", type=float, default=0.0, help="where the decay ends; >= 0 (%(default)s)")
    add("--compile", **SWITCH, help="torch.compile the feed-forward layers (false)")
    add("--gradient_checkpointing", **SWITCH, help="less memory for a third more time (false)")
    add = parser.add_argument_group("evaluation and saving").add_argument
    add("--log_interval", type=int, default=10, help="optimizer steps; >= 1 (%(default)s)")
    add("--eval_interval", type=int, default=0, help="optimizer steps; 0: each epoch (%(default)s)")
    add("--save_interval", type=int, default=0, help="optimizer steps; 0: each evaluation (%(default)s)")
    add("--save_total_limit", type=int, default=3, help="checkpoints kept; >= 1 (%(default)s)")
    add("--early_stopping_patience", type=int, default=0, help="evaluations without gain; 0: off (%(default)s)")
    add("--num_samples", type=int, default=3, help="held-out prompts answered at each evaluation (%(default)s)")
    add("--report_to", choices=("none", "tensorboard"), default="none", help="(%(default)s)")
    add("--resume_from", metavar="PATH", help="auto, a run directory or a checkpoint (none: start)")
    add("--overwrite_output_dir", **SWITCH, help="remove the run that the directory holds (false)")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./outputs", metavar="DIR", help="(%(default)s; --demo: ./outputs/demo)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="(%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s)")
    add("--demo", **SWITCH, help="train a tiny GPT-2, then LoRA on it, on the bundled sample (false)")
    add = parser.add_argument_group("using a model").add_argument
    add("--adapter_path", metavar="DIR", help="start from, evaluate or prompt what a run saved (none)")
    add("--eval_only", **SWITCH, help="evaluate on the held-out rows, train nothing (false)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="answer it; repeatable (none)")
    add("--max_new_tokens", type=int, default=128, help="of an answer; >= 1 (%(default)s)")
    add("--temperature", type=float, default=0.0, help="of sampling; 0: greedy (%(default)s)")
    return parser


def train_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags, a line each; nothing is loaded."""
    checks = [(1 <= getattr(args, n) < 2**31, n, "at least 1") for n in (
        "epochs", "gradient_accumulation_steps", "log_interval", "save_total_limit", "max_new_tokens",
    )]  # fmt: skip
    checks += [(0 <= getattr(args, n) < 2**31, n, "0 or more") for n in (
        "max_steps", "eval_interval", "save_interval", "early_stopping_patience", "num_samples",
    )]  # fmt: skip
    checks += [(0 <= getattr(args, n) < math.inf, n, "0 or more, finite") for n in (
        "weight_decay", "max_grad_norm", "min_lr", "temperature",
    )]  # fmt: skip
    checks += [(args.learning_rate is None or 0 < args.learning_rate < math.inf, "learning_rate", "above 0")]
    checks += [(args.warmup_steps is None or 0 <= args.warmup_steps < 2**31, "warmup_steps", "0 or more")]
    checks += [(getattr(args, n) != "", n, "an empty name") for n in ("output_dir", "adapter_path", "resume_from")]
    checks += [(not data_pipeline.HALF_PAIR.search(text), "prompt", "not UTF-8") for text in args.prompt]
    problems = [f"--{name} {getattr(args, name)}: {legal}" for fine, name, legal in checks if not fine]
    if args.gradient_checkpointing and args.modification_type == "prefix" and args.prefix_type == "key_value":
        problems.append("--gradient_checkpointing: drops the cache that carries a key_value prefix")
    if args.eval_only and not (args.dataset_path or args.eval_dataset_path):
        problems.append("--eval_only: needs --eval_dataset_path, or --dataset_path to hold rows out of")
    elif not (args.dataset_path or args.demo or args.eval_only or args.prompt):
        problems.append("--dataset_path: needed to train (or --demo)")
    if args.adapter_path and args.from_scratch:
        problems.append("--from_scratch: --adapter_path brings the base that it was trained on")
    if args.demo and args.resume_from:
        problems.append("--resume_from: --demo always starts anew")
    if args.demo and args.adapter_path:
        problems.append("--adapter_path: --demo trains a base of its own")
    if args.demo and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        problems.append("--demo: runs in a single process, without torchrun")
    if args.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        problems.append("--report_to tensorboard: needs the package: pip install tensorboard")
    if args.resume_from and args.overwrite_output_dir:
        problems.append("--overwrite_output_dir: would remove the run that --resume_from continues")
    return problems


def uses_only(args: argparse.Namespace) -> bool:
    """Whether a model is evaluated or prompted, and nothing is trained."""
    return args.eval_only or bool(args.prompt and not args.dataset_path)


def idle_flags(args: argparse.Namespace) -> list[str]:
    """A line for each flag that was given and changes nothing."""
    parser = build_parser()
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)} - {"demo"}
    given -= {"learning_rate"} if args.learning_rate in LEARNING_RATES.values() else set()  # filled in by parse
    if args.demo:
        read = {"output_dir", "overwrite_output_dir", "device", "precision", "seed"}
        return [f"--{name}: without effect, --demo has its own" for name in sorted(given - read)]
    lines = [] if args.adapter_path else modify_llm.idle_flags(args, parser.get_default)
    if uses_only(args):
        training = [g for g in parser._action_groups if g.title in ("optimisation", "evaluation and saving")]
        idle = {action.dest for group in training for action in group._group_actions}
        idle |= {"modification_type"} if not args.adapter_path else set()
        idle |= {"eval_dataset_path", "eval_fraction", "batch_size"} if not args.eval_only else set()
        lines += [f"--{name}: without effect, nothing is trained" for name in sorted(given & idle)]
    if args.eval_dataset_path and "eval_fraction" in given:
        lines.append("--eval_fraction: without effect beside --eval_dataset_path")
    if args.adapter_path and args.model_name_or_path and args.modification_type in modify_llm.PLAIN:
        lines.append("--model_name_or_path: without effect, --adapter_path holds a whole model")
    if args.warmup_steps and args.scheduler in ("cosine", "constant"):
        lines.append(f"--warmup_steps: without effect, --scheduler {args.scheduler} has no warm-up")
    if args.min_lr and args.scheduler == "constant":
        lines.append("--min_lr: without effect, --scheduler constant does not decay")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked flags; leaves with status 2, all problems on one line, if any is out of range.

    With --adapter_path, the model's and the text's flags take what it was trained with as their defaults.
    """
    parser, saved, problems = build_parser(), {}, []
    args = parser.parse_args(argv)
    if args.adapter_path:
        with suppress(ValueError):  # load_trained tells
            saved, _ = modify_llm.trained_settings(Path(args.adapter_path))
        known = {*vars(modify_llm.with_defaults()), "text_format", "max_length"} - {"model_name_or_path"}
        saved = {name: value for name, value in saved.items() if name in known}
        parser.set_defaults(model_name_or_path=None, **saved)
        args = parser.parse_args(argv)
    for name, value in saved.items():
        if name not in ("text_format", "max_length") and getattr(args, name) != value:
            problems.append(f"--{name}: {args.adapter_path} was trained with {value}")
    problems += data_pipeline.data_problems(args) + modify_llm.model_problems(args) + train_problems(args)
    if problems:
        parser.error("; ".join(problems))
    if args.learning_rate is None:
        technique = args.prefix_type if args.modification_type == "prefix" else args.modification_type
        args.learning_rate = LEARNING_RATES[technique]
    return args


# ---- where it runs ---------------------------------------------------------------------------------------------------


@dataclass
class Runtime:
    """The device, the arithmetic and this process's place among the others."""

    device: torch.device
    dtype: torch.dtype  # of matrix products and frozen weights; trainable weights stay fp32
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Adds up each value over the processes; exact for counts."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def bf16_in_hardware(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 would say yes, and crawl
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def choose_runtime(args: argparse.Namespace) -> Runtime:
    """Raises ValueError for a device or precision that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in available if available[n]) if args.device == "auto" else args.device
    if not available[name]:
        raise ValueError(f"--device {name}: PyTorch finds none here; auto takes what there is")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    bf16 = bf16_in_hardware(device)
    choice = args.precision
    if choice == "auto":
        choice = "bf16" if bf16 else "fp16" if name == "cuda" else "fp32"
    if choice == "bf16" and not bf16:
        raise ValueError(f"--precision bf16: this {name} has no bf16 of its own; auto takes what there is")
    if choice == "fp16" and name != "cuda":
        raise ValueError(f"--precision fp16: needs a CUDA GPU, this is {name}; auto takes what there is")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is still fp32
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return Runtime(device, dtype, int(os.environ.get("RANK", 0)), world_size)


class LogHandler(logging.Handler):
    """Lines on stdout, past a progress bar on stderr, and in the run's log file, or kept for it until it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.file: TextIO = io.StringIO()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        with suppress(OSError):  # on a full disk, what fails next tells it in one line
            print(line, file=self.file, flush=True)
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # `train_llm.py | head`: the run goes on, its log file tells the rest
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class LogFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.name == plain.name else f"{record.levelname}:{record.name}:"
        return prefix + record.getMessage()


def set_up_logging(rank: int) -> None:
    """Process 0 alone speaks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="ignore")  # a cp1252 terminal gets the lines without the emoji
    handler = LogHandler() if rank == 0 else logging.NullHandler()
    handler.setFormatter(LogFormat())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    disable_progress_bar()


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Directs to a file what is logged, and what was since the start or the file before."""
    (handler,) = logging.getLogger().handlers
    file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115
    file.write(handler.file.getvalue())
    file.flush()
    handler.file = file
    try:
        yield
    finally:
        handler.file = io.StringIO()
        with suppress(OSError):  # a full disk is told already
            file.close()


# ---- the loss --------------------------------------------------------------------------------------------------------


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `hidden @ weight.T` against `targets`, without ever holding all the logits.

    A chunk of rows at a time: logits, fp32 log-sum-exp, and, while they are at hand, the gradient softmax - one-hot
    multiplied on to `hidden` and `weight`. The loss is a sum, so the backward pass only scales what is ready.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, with_grad: bool) -> Tensor:
        # hidden (rows, hidden size), weight (vocabulary, hidden size), targets (rows,)
        weight = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if with_grad and ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_grad and ctx.needs_input_grad[1] else None
        chunk, strip = (2048, 2048) if hidden.is_cuda else (512, 8)  # rows: of logits; of fp32 passes in a CPU's cache
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.t()  # (chunk, vocabulary)
            for first in range(0, len(logits), strip):
                part, target = logits[first : first + strip], targets[rows][first : first + strip, None]
                exact = part.float()
                at_target, largest = exact.gather(1, target), exact.amax(1, keepdim=True)
                softmax = exact.softmax(1)
                loss += (largest - softmax.amax(1, keepdim=True).log() - at_target).sum()
                if hidden_grad is not None or weight_grad is not None:
                    softmax.scatter_add_(1, target, softmax.new_full(target.shape, -1))
                    part.copy_(softmax)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad += logits.t() @ hidden[rows]
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_grad = None if hidden_grad is None else (hidden_grad.float() * scale).to(hidden_grad.dtype)
        return hidden_grad, None if weight_grad is None else weight_grad * scale, None, None


class SummedLoss(nn.Module):
    """The summed loss over a batch's labelled tokens. (A module, so that DistributedDataParallel can wrap it.)

    From here on the model takes packed rows alone, until its attention implementation is set back.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model
        AttentionInterface.register("packed", packed_attention)  # without a mask function: it needs none
        model.set_attn_implementation("packed")

    def forward(self, positions: Tensor, targets: Tensor, **packed: Any) -> Tensor:
        """See pack for what the arguments hold."""
        hidden = self.model.transformer(**packed, use_cache=False).last_hidden_state[0]  # (tokens, hidden size)
        hidden = hidden.index_select(0, positions)  # the head only where there is a label
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        with torch.autocast(hidden.device.type, enabled=False):
            return ChunkedCrossEntropy.apply(hidden, self.model.lm_head.weight, targets, torch.is_grad_enabled())


def as_grids(sizes: Sizes, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Each grid of the tensors (vectors, head size), as (n, width, head size)."""
    parts = [x.split([n * width for n, width in sizes]) for x in tensors]
    for (n, width), *grids in zip(sizes, *parts, strict=True):
        yield [grid.view(n, width, -1) for grid in grids]


@dataclass
class Packing:
    """How the rows of a batch, which stand one behind the other without padding, are laid out for the attention."""

    grids: Sizes  # (rows, width) each, for rows of about one length; padded
    sources: Tensor  # (places,): each place's token, grid by grid; `tokens` where there is none
    tokens: int  # all of them, those of the rows that fill up included
    made: tuple[Tensor, Tensor, Tensor] | None = None  # by the first layer, for all of them

    def vectors(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(token, head) of each vector of the grids, which lie as (row, head, position), (places * heads,) each; and
        where the vector of each token and head lies among them, (tokens * heads,)."""
        if self.made is None:
            head = torch.arange(heads, device=self.sources.device)[:, None]
            grids = self.sources.split([rows * width for rows, width in self.grids])
            tokens = [grid.view(rows, 1, width) for grid, (rows, width) in zip(grids, self.grids, strict=True)]
            vectors = torch.cat([(token * heads + head).flatten() for token in tokens])
            slots = vectors.new_empty((self.tokens + 1) * heads)  # the last ones: of places without a token
            slots[vectors] = torch.arange(len(vectors), device=vectors.device)
            self.made = vectors // heads, vectors % heads, slots[: self.tokens * heads]
        return self.made


class ToGrids(torch.autograd.Function):
    """x (heads, tokens, head size) to its places in the grids, (places * heads, head size), in a single copy.

    Where there is no token stands the batch's last: as a key it comes after all of its row, so that none looks at it,
    and what it finds as a query is left out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        heads, tokens, size = x.shape
        token, head, ctx.slots = packing.vectors(heads)
        ctx.heads = heads
        head_step, token_step = (stride // size for stride in x.stride()[:2])  # x may be a part of a fused projection
        assert x.stride() == (head_step * size, token_step * size, 1)
        vectors = x.as_strided(((heads - 1) * head_step + (tokens - 1) * token_step + 1, size), (size, 1))
        return vectors.index_select(0, token.clamp(max=tokens - 1) * token_step + head * head_step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.slots).view(-1, ctx.heads, grad.shape[1]).transpose(0, 1), None


class FromGrids(torch.autograd.Function):
    """x (places * heads, head size) back to (tokens, heads, head size)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing, heads: int) -> Tensor:
        ctx.packing = packing
        _, _, slots = packing.vectors(heads)
        return x.index_select(0, slots).view(packing.tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, heads, size = grad.shape
        token, head, _ = ctx.packing.vectors(heads)
        vectors = torch.cat([grad.flatten(0, 1), grad.new_zeros(heads, size)])  # no token, no gradient
        return vectors.index_select(0, token * heads + head), None, None


class BlockAttention(torch.autograd.Function):
    """softmax(Q K^T) V, causal, for CPUs: a block of queries at a time against the keys up to its end.

    See causal_attention for the arguments. In bf16 this is several times faster than PyTorch's fused kernel on short
    rows, and not slower up to 512 tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, queries: Sizes, keys: Sizes, scaling: float
    ) -> Tensor:
        output, weights = torch.empty_like(query), []
        for (q, o), (k, v) in zip(as_grids(queries, query, output), as_grids(keys, key, value), strict=True):
            for start in range(0, q.shape[1], QUERY_BLOCK):
                block = slice(start, start + QUERY_BLOCK)
                length = q[:, block].shape[1]
                seen = k.shape[1] - q.shape[1] + start + length
                mask = q.new_full((length, seen), -math.inf).triu_(seen - length + 1)
                scores = torch.baddbmm(mask, q[:, block], k[:, :seen].transpose(1, 2), alpha=scaling)
                weights.append(scores.softmax(-1))  # (n, length, seen)
                o[:, block] = torch.bmm(weights[-1], v[:, :seen])
        ctx.save_for_backward(query, key, value, *weights)
        ctx.sizes, ctx.scaling = (queries, keys), scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (query, key, value, *weights), (queries, keys), scaling = ctx.saved_tensors, ctx.sizes, ctx.scaling
        query_grad, key_grad, value_grad = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        of_queries = as_grids(queries, query, grad, query_grad)
        of_keys, remaining = as_grids(keys, key, value, key_grad, value_grad), iter(weights)
        for (q, g, q_grad), (k, v, k_grad, v_grad) in zip(of_queries, of_keys, strict=True):
            for start in range(0, q.shape[1], QUERY_BLOCK):
                block, p = slice(start, start + QUERY_BLOCK), next(remaining)
                seen = p.shape[2]
                v_grad[:, :seen].baddbmm_(p.transpose(1, 2), g[:, block])
                p_grad = torch.bmm(g[:, block], v[:, :seen].transpose(1, 2))
                scores_grad = torch.ops.aten._softmax_backward_data(p_grad, p, -1, p.dtype)
                q_grad[:, block] = torch.bmm(scores_grad, k[:, :seen]).mul_(scaling)
                k_grad[:, :seen].baddbmm_(scores_grad.transpose(1, 2), q[:, block], alpha=scaling)
        return query_grad, key_grad, value_grad, None, None, None


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Sizes, keys: Sizes, scaling: float, dropout: float
) -> Tensor:
    """Attention within each of the grids that lie one behind the other in query, key and value (vectors, head size).

    queries, keys: (rows * heads, width) of each grid; a row's queries stand at the end of its keys. Returns the shape
    of query.
    """
    if query.device.type == "cpu" and not dropout:
        return BlockAttention.apply(query, key, value, queries, keys, scaling)
    outputs = []
    for (q,), (k, v) in zip(as_grids(queries, query), as_grids(keys, key, value), strict=True):
        length, seen = q.shape[1], k.shape[1]
        kind: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "is_causal": length == seen}
        if length != seen:  # a mask rules the faster kernels out
            kind["attn_mask"] = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
        outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], **kind)[0].flatten(0, 1))
    return torch.cat(outputs)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, packing: Packing,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each row of a packed batch; query, key, value: (1, heads, tokens, head size).

    Tokens before the first row are a prefix: every row sees it and it sees no row, so that it is computed once for
    all. It has no queries when it comes from a cache.
    """
    heads, size, how = query.shape[1], query.shape[3], {"scaling": scaling, "dropout": dropout}
    own, prefix = query.shape[2] - packing.tokens, key.shape[2] - packing.tokens  # queries and keys of the prefix
    queries = [(rows * heads, width) for rows, width in packing.grids]
    keys = [(n, prefix + width) for n, width in queries]
    q = ToGrids.apply(query[0, :, own:], packing)
    k, v = (ToGrids.apply(x[0, :, prefix:], packing) for x in (key, value))
    if prefix:
        k, v = (behind_prefix(x[0, :, :prefix], y, queries) for x, y in ((key, k), (value, v)))
    output = FromGrids.apply(causal_attention(q, k, v, queries, keys, **how), packing, heads)
    if own:
        first = [x[0, :, :own].reshape(-1, size) for x in (query, key, value)]
        first = causal_attention(*first, [(heads, own)], [(heads, own)], **how).view(heads, own, size)
        output = torch.cat([first.transpose(0, 1), output])
    return output[None], None


def behind_prefix(prefix: Tensor, x: Tensor, sizes: Sizes) -> Tensor:
    """The prefix (heads, length, head size) before each row of the grids x."""
    grids = []
    for (grid,) in as_grids(sizes, x):
        shared = prefix.repeat(len(grid) // len(prefix), 1, 1)
        grids.append(torch.cat([shared, grid], dim=1).flatten(0, 1))
    return torch.cat(grids)


def loss_inputs(batch: dict[str, Tensor], runtime: Runtime, at_once: int | None = None) -> list[dict[str, Any]]:
    """A batch of the data pipeline as SummedLoss takes it, on the device: its rows from long to short, in parts of
    about `at_once` tokens (CPU_TOKENS; elsewhere in one). The sums over the parts are those of the whole."""
    at_once = at_once or (CPU_TOKENS if runtime.device.type == "cpu" else sys.maxsize)
    lengths = batch["attention_mask"].sum(1)
    order = lengths.argsort(descending=True, stable=True)
    ends, total = lengths[order].cumsum(0), int(lengths.sum())
    part = (2 * ends - lengths[order]) * math.ceil(total / at_once) // (2 * total)  # where a row's middle falls
    return [pack({name: x[order[part == i]] for name, x in batch.items()}, runtime) for i in part.unique().tolist()]


def pack(batch: dict[str, Tensor], runtime: Runtime) -> dict[str, Any]:
    """Rows, given from long to short, one behind the other instead of padded; a few of no text fill them up.

    positions: the tokens whose successors carry a label; targets: those successors. All is found on the CPU, where
    the batch is, so that a GPU is never waited for.
    """
    real, lengths = batch["attention_mask"].bool(), batch["attention_mask"].sum(1).tolist()
    input_ids, labels = batch["input_ids"][real], F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)[real]
    position_ids = torch.arange(real.shape[1]).expand_as(real)[real]
    positions = (labels != IGNORED).nonzero().squeeze(1)
    # A CPU builds kernels for each new shape, which takes longer than to use them once: widths are rounded up, and the
    # number of tokens to sixteen values an octave, by rows that have no labels.
    filler = -len(input_ids) % max(ROUND_TO, 2 ** (len(input_ids).bit_length() - 5))
    full = max(ROUND_TO, lengths[0])  # the filler's rows are no longer than the others
    lengths += [full] * (filler // full) + [filler % full] * (filler % full > 0)
    grids, starts = [], []
    for length in lengths:
        width = -(-length // ROUND_TO) * ROUND_TO
        if not grids or not 0.75 * grids[-1][1] <= width <= grids[-1][1]:
            grids.append((0, width))
        starts.append(sum(rows * width for rows, width in grids))
        grids[-1] = (grids[-1][0] + 1, grids[-1][1])
    places = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    tokens, sources = len(places), torch.full((sum(rows * width for rows, width in grids),), len(places))
    inputs = {
        "input_ids": F.pad(input_ids, (0, filler))[None],
        "position_ids": F.pad(position_ids, (0, filler))[None],
        "sources": sources.index_copy_(0, places, torch.arange(tokens)),
        "positions": positions,
        "targets": labels[positions],
    }
    if runtime.device.type == "cuda":
        inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
    inputs = {name: tensor.to(runtime.device, non_blocking=True) for name, tensor in inputs.items()}
    return inputs | {"packing": Packing(grids, inputs.pop("sources"), tokens)}


@torch.no_grad()
def evaluate(
    summed_loss: SummedLoss, loader: DataLoader, runtime: Runtime, stop: Callable[[], bool] = lambda: False
) -> tuple[float, int]:
    """(mean loss over the labelled tokens of all held-out rows, their number), over all processes.

    stop: asked before each batch; once it says so, the rest is left out.
    """
    training = summed_loss.training
    summed_loss.eval()
    losses, tokens = [torch.zeros((), device=runtime.device)], 0
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=None if runtime.rank == 0 else True):
        if stop():
            break
        for inputs in loss_inputs(batch, runtime):
            with runtime.autocast():
                losses.append(summed_loss(**inputs))
            tokens += len(inputs["targets"])
    summed_loss.train(training)
    total, count = runtime.sum_over_ranks(torch.stack(losses).cpu().double().sum().item(), tokens)
    return total / max(1, count), int(count)


# ---- the parts of a run ----------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands: all of the training state that is not a tensor."""

    step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    first_loss: float | None = None  # held out, before the first step
    last_loss: float | None = None  # held out, at the latest evaluation
    evaluations_without_gain: int = 0
    evaluation_due: bool = True  # the first one precedes the first step
    stopped_early: bool = False
    loss_sum: float = 0.0  # since the last line of the log
    target_count: int = 0


class Run:
    """The parts of one training run, for the functions below; `prepare` makes what is only declared here."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    train_rows: AlpacaDataset
    eval_rows: AlpacaDataset
    dataset_hash: str
    loader: DataLoader
    eval_loader: DataLoader | None
    counts: tuple[int, int]  # parameters, those that train
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    total_steps: int

    def __init__(self, args: argparse.Namespace, runtime: Runtime) -> None:
        self.args, self.runtime = args, runtime
        self.settings = dict(vars(args))
        self.output_dir = Path(args.output_dir)
        self.progress = Progress()
        self.resumed_from: int | None = None
        self.at_once: int | None = None  # tokens that go through the model together in training; None: as usual
        self.signal: int | None = None  # what this process was told
        self.stopping = False  # what all processes agreed on after a step
        self.started = time.perf_counter()
        self.writer: Any = None  # tensorboard's
        self.closing = ExitStack()  # what ends with the run: lock, log file, signal handlers

    def told_to_stop(self) -> bool:
        """By a signal: a single process at any moment, several where all have heard of it."""
        return self.stopping or (self.runtime.world_size == 1 and self.signal is not None)


def tokenizer_for(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer that the flags name: by default the model's own, or GPT-2's where the model brings none."""
    if args.tokenizer_name_or_path:
        return load_tokenizer(args.tokenizer_name_or_path)
    base = None if args.from_scratch else args.model_name_or_path
    if args.adapter_path and not base:
        base = modify_llm.trained_settings(Path(args.adapter_path))[0].get("base_model_name_or_path")
    for directory in (args.adapter_path, base):
        if directory and any((Path(directory) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return load_tokenizer(directory)
    here = not base or Path(base).exists() or Path(base).is_absolute()  # no hub id, at any rate
    return load_tokenizer("gpt2" if here else base)


def load_rows(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[AlpacaDataset, AlpacaDataset]:
    """(training rows, held-out rows); rows with nothing to learn are left out and counted."""

    def labelled(flag: str) -> AlpacaDataset:
        path = getattr(args, flag)
        dataset = load_dataset(path, tokenizer, text_format=args.text_format, max_length=args.max_length, flag=flag)
        keep = dataset.label_counts > 0
        if not keep.any():
            raise ValueError(f"--{flag} {path}: no row is left to learn from")
        if not keep.all():
            logger.info("%d rows with nothing to learn are left out of %s", (~keep).sum(), path)
        return dataset.select(keep)

    if args.eval_dataset_path:
        held_out = labelled("eval_dataset_path")
        train = held_out if args.eval_only else labelled("dataset_path")
    else:
        train, held_out = labelled("dataset_path").split(args.eval_fraction, args.seed)
    if not len(held_out if args.eval_only else train):
        purpose = "evaluate" if args.eval_only else "train"
        raise ValueError(f"--eval_fraction {args.eval_fraction}: leaves no row to {purpose} on")
    return train.first(args.max_samples), held_out.first(args.max_eval_samples)


def make_loader(run: Run, rows: AlpacaDataset, **how: Any) -> DataLoader:
    """This process's micro-batches, each of rows of about one length."""
    args, runtime = run.args, run.runtime
    return final_dataset_loader(
        rows, tokenizer=run.tokenizer, padding="longest", group_by_length=True, batch_size=args.batch_size,
        num_workers=args.num_workers, rank=runtime.rank, world_size=runtime.world_size, seed=args.seed, **how,
    )  # fmt: skip


def build_model(args: argparse.Namespace, output_dir: Path) -> GPT2LMHeadModel:
    """The model to train: the base with the technique, or what --adapter_path holds."""
    torch.manual_seed(args.seed)
    base = output_dir / "base"
    if args.adapter_path:
        model = load_trained(args.adapter_path, args.model_name_or_path, dropout=args.dropout)
    elif args.from_scratch and args.resume_from and checkpoint_directories(output_dir) and base.is_dir():
        model = final_modify(args, from_scratch=False, model_name_or_path=str(base))
    else:
        model = final_modify(args)
    model.modification |= {"text_format": args.text_format, "max_length": args.max_length}
    return model


def prefix_length(model: GPT2LMHeadModel) -> int:
    """How many of the model's positions virtual tokens take."""
    return len(model.transformer.prefix.embedding) if hasattr(model.transformer, "prefix") else 0


def check_fits(run: Run, length: int) -> None:
    """Texts of so many tokens, prefix and vocabulary must fit the model."""
    config, virtual = run.model.config, prefix_length(run.model)
    if length + virtual > config.n_positions:
        prefix = f" with a prefix of {virtual}" if virtual else ""
        raise ValueError(f"--max_length {length}{prefix}: the model has {config.n_positions} positions")
    if len(run.tokenizer) > config.vocab_size:
        tokens = f"{len(run.tokenizer)} tokens, the model has embeddings for {config.vocab_size}"
        raise ValueError(f"--tokenizer_name_or_path: the tokenizer has {tokens}")


class SigmoidGELU(nn.Module):
    """GELU's tanh form, 0.5 x (1 + tanh(u)) = x sigmoid(2 u): compiled, a third of the time of either's own kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def prepare_model(model: GPT2LMHeadModel, args: argparse.Namespace, runtime: Runtime) -> None:
    """To the device: frozen matrices in the runtime's precision, all that trains and all that is 1-D in fp32."""
    for parameter in model.parameters():
        dtype = runtime.dtype if parameter.ndim > 1 and not parameter.requires_grad else torch.float32
        # Weights lie in the mapped file of the base: where some leave it, all do, or the whole would stay in memory.
        parameter.data = parameter.data.to(runtime.device, dtype, copy=runtime.dtype != torch.float32)
    model.to(runtime.device)
    for block in model.transformer.h:
        if model.config.activation_function == "gelu_new":  # the same function, fused
            block.mlp.act = nn.GELU(approximate="tanh")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()


def make_optimizer(model: GPT2LMHeadModel, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no decay on biases, LayerNorms and other 1-D ones."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused
    )


# ---- answers ---------------------------------------------------------------------------------------------------------


def prompt_text(text: str, text_format: str) -> str:
    """What the model reads for a --prompt: the text in the run's own format.

    For formats with several fields before the response, the text may be a JSON object of them.
    """
    if text_format == "output":
        return text
    columns, before_response = data_pipeline.format_columns(text_format), text_format.split("||")[0]
    if text_format == "alpaca":
        before_response = data_pipeline.PROMPT_WITH_INPUT
    read = [name for name in columns if f"{{{name}}}" in before_response]
    required = [name for name in read if name != "input"] or read  # an input may be empty, as in the data
    fields = {required[0]: text} if len(required) == 1 else {}
    if text.lstrip().startswith("{"):
        with suppress(ValueError, AttributeError):
            fields = {name: str(value) for name, value in json.loads(text).items()}
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"--prompt: the format reads {read}; give a JSON object, {missing[0]!r} is missing")
    return split_text(text_format, dict.fromkeys(columns, "") | fields)[0]


def prompt_ids(run: Run, text: str) -> list[int]:
    """The tokens of a --prompt in the run's own format; raises ValueError for one that cannot be put."""
    whole, positions = prompt_text(text, run.args.text_format), run.model.config.n_positions
    ids = run.tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False).ids  # `<|endoftext|>` is text
    if len(ids) + prefix_length(run.model) >= positions:
        raise ValueError(f"--prompt {text[:20]!r}...: {len(ids)} tokens leave no room in {positions} positions")
    return ids or [run.tokenizer.eos_token_id]


@torch.no_grad()
def generate_text(run: Run, model: GPT2LMHeadModel, prompt_ids: list[int]) -> tuple[str, bool]:
    """(the model's answer, whether it stopped by itself). Draws nothing from the training's random state."""
    args, runtime, eos = run.args, run.runtime, run.tokenizer.eos_token_id
    room = model.config.n_positions - prefix_length(model) - len(prompt_ids)
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")  # text by text, with a cache
    ids = torch.tensor([prompt_ids], device=runtime.device)
    sampling = {"temperature": args.temperature, "top_k": 0} if args.temperature else {}
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices), runtime.autocast():
        torch.manual_seed(args.seed)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(args.max_new_tokens, room), use_cache=True,
            eos_token_id=eos, pad_token_id=eos, do_sample=bool(sampling), **sampling,
        )[0, len(prompt_ids) :].tolist()  # fmt: skip
    model.set_attn_implementation(attention)
    model.train(training)
    stopped = eos in output
    return run.tokenizer.decode(output[: output.index(eos)] if stopped else output), stopped


def answer_prompts(run: Run) -> None:
    for text in run.args.prompt if run.runtime.rank == 0 else []:
        answer, stopped = generate_text(run, run.model, prompt_ids(run, text))
        plain.info("Prompt: %s\nAnswer: %s%s", text, answer.strip(), "" if stopped else " [...]")


def held_out_prompts(run: Run) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, reference ids) of the first held-out rows; a text without a prompt lends its first eight tokens."""
    pairs, rows = [], run.eval_rows
    for row in range(min(run.args.num_samples, len(rows))):
        ids = rows[row]["input_ids"].tolist()
        end = int(rows.prompt_lengths[row]) or min(8, len(ids) - 1)
        pairs.append((ids[:end], ids[end : None if rows.truncated[row] else -1]))
    return pairs


# ---- what a run writes -----------------------------------------------------------------------------------------------


def claim_directory(run: Run, create: bool) -> None:
    """Makes the output directory this process's own, and puts right what a crash left there.

    create: also one that is not there yet. Raises ValueError for one that is not to be had.
    """
    args, output_dir = run.args, run.output_dir
    if run.runtime.rank != 0:
        return
    refuse_used_directory(args)
    if not (create or output_dir.exists()):
        return
    lock = filelock.FileLock(output_dir / ".lock", is_singleton=True)  # this process may take it more than once
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        run.closing.enter_context(lock.acquire(timeout=10))  # a killed run's DataLoader workers hold it for seconds
    except filelock.Timeout:
        raise ValueError(f"--output_dir {output_dir}: another run is writing there") from None
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir}: cannot be written to: {error.strerror}") from None
    refuse_used_directory(args)  # another run may have come and gone meanwhile
    recover_and_clean(output_dir)


def refuse_used_directory(args: argparse.Namespace) -> None:
    """A run is never written over by accident, nor continued in the directory of another one."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir}: is a file")
    signs = ("run.json", "metrics.jsonl", "checkpoints", "best", "final", *(["base"] if args.from_scratch else []))
    holds_run = any((output_dir / name).exists() for name in signs)
    root = Path(args.resume_from or os.devnull).resolve()
    goes_on = args.resume_from == "auto" or output_dir.resolve() in (root, root.parent.parent)
    if holds_run and not goes_on and not args.overwrite_output_dir:
        raise ValueError(f"--output_dir {output_dir}: holds a run; --resume_from auto, or --overwrite_output_dir")


def recover_and_clean(output_dir: Path) -> None:
    """After a crash: puts back what was moved away for a replacement that never came, removes what was half-written."""
    name_of_ours = re.compile(r"\.(new|old|trash)_(best|final|base|step_\d+)")
    ours = [path for path in output_dir.glob(".*") if name_of_ours.fullmatch(path.name)]
    for old in [path for path in ours if path.name.startswith(".old_")]:
        name = old.name.removeprefix(".old_")
        place = output_dir / "checkpoints" / name if name.startswith("step_") else output_dir / name
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            old.rename(place)
    for stale in ours:
        shutil.rmtree(stale, ignore_errors=True)


def clear_directory(output_dir: Path) -> None:
    """Removes what a run wrote, and nothing else."""
    for path in itertools.chain.from_iterable(output_dir.glob(pattern) for pattern in OWN):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


@contextmanager
def whole_directory(output_dir: Path, name: str) -> Iterator[Path]:
    """A directory to fill; only when it is whole, with sha256 sums, and synced, does it become output_dir/name."""
    path = output_dir / name
    new, old = output_dir / f".new_{path.name}", output_dir / f".old_{path.name}"
    try:
        new.mkdir()
        yield new
        files = {file.name: modify_llm.file_hash(file) for file in sorted(new.iterdir()) if file.name != CARD}
        digest = modify_llm.manifest_hash(files)
        modify_llm.write_json(new / modify_llm.MANIFEST, {"files": files, "manifest_sha256": digest})
        for item in [*new.iterdir(), new]:
            sync(item)
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot sync a directory
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_records(run: Run) -> None:
    """Clears what --overwrite_output_dir says to clear; then run.json, metrics.jsonl and the log file begin."""
    args, output_dir = run.args, run.output_dir
    if run.runtime.rank != 0:
        return
    if args.overwrite_output_dir:
        clear_directory(output_dir)
    cut_metrics(output_dir / "metrics.jsonl", run.progress if run.resumed_from is not None else None)
    run.closing.enter_context(log_file(output_dir / f"training_{datetime.now():%Y%m%d_%H%M%S}.log"))
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        run.writer = SummaryWriter(output_dir / "tensorboard", purge_step=run.progress.step + 1)
        run.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in run.settings.items()))
        run.closing.callback(run.writer.close)
    total, trainable = run.counts
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    record = {"settings": run.settings, "versions": versions, "dataset_sha256": run.dataset_hash}
    record |= {"parameters": {"total": total, "trainable": trainable}, "world_size": run.runtime.world_size}
    record |= {"device": str(run.runtime.device), "dtype": str(run.runtime.dtype)}
    modify_llm.write_json(output_dir / "run.json", record)


def cut_metrics(path: Path, progress: Progress | None) -> None:
    """Drops the rows that a run resumed at `progress` writes again: after its step, and an evaluation still due."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the half-written last line of a killed run
                row = json.loads(line)
                due = progress and progress.evaluation_due and "eval_loss" in row
                if progress and row["step"] < progress.step + (not due):
                    rows.append(line + "\n")
    new = path.with_name("metrics.jsonl.new")
    new.write_text("".join(rows), encoding="utf-8")
    new.replace(path)  # at once: a kill in between must not lose the rows


def write_metrics(run: Run, row: dict[str, Any]) -> None:
    if run.runtime.rank != 0:
        return
    with open(run.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if run.writer:
        for name, value in row.items():
            if name not in ("step", "epoch"):
                run.writer.add_scalar(name, value, row["step"])


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def save_scratch_base(run: Run) -> None:
    """Writes the random base that the run starts from (the seed makes it again) to base/, to load the result on."""
    base_dir, args = run.output_dir / "base", run.args
    if run.runtime.rank == 0 and not run.model.base_path:  # else it was loaded from there
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            base = GPT2LMHeadModel(modify_llm.read_config(args))
        with whole_directory(run.output_dir, "base") as directory:
            base.save_pretrained(directory)
    run.model.base_path = run.model.base_name = str(base_dir)


def write_model(run: Run, name: str) -> None:
    """best/ or final/."""
    with whole_directory(run.output_dir, name) as directory:
        save_trained(run.model, directory)
        run.tokenizer.save_pretrained(directory)
        (directory / CARD).write_text(model_card(run), encoding="utf-8")


def model_card(run: Run) -> str:
    """README.md for best/ and final/: base, technique, data, settings, results, how to load."""
    args, state, base = run.args, run.progress, run.model.base_name or "random weights"
    total, trainable = run.counts
    technique, chosen = run.model.modification["modification_type"], vars(args) | run.model.modification
    load, library = [f'model = AutoModelForCausalLM.from_pretrained("{base}")'], "peft"
    load.append('model = PeftModel.from_pretrained(model, "DIR")  # peft')
    if technique in modify_llm.PLAIN:
        load, library = ['model = AutoModelForCausalLM.from_pretrained("DIR")  # transformers'], "transformers"
    elif technique == "adapter":
        load, library = [], ""
    settings = ("learning_rate", "scheduler", "warmup_steps", "weight_decay", "max_grad_norm", "batch_size")
    settings += ("gradient_accumulation_steps", "max_length", "seed", *modify_llm.SETTINGS[technique])
    perplexities = [f"{perplexity(loss):.2f}" for loss in (state.first_loss, state.last_loss) if loss is not None]
    return "\n".join([
        "---", f"base_model: {base}", *([f"library_name: {library}"] if library else []), "---",
        f"# {technique} on {base}", "",
        f"- Trained: {trainable:,} of {total:,} parameters ({trainable / total:.2%}), {state.step:,} steps",
        f"- Data: {len(run.train_rows):,} rows of {Path(args.dataset_path).name}, format {args.text_format!r}",
        f"- Held-out perplexity, {len(run.eval_rows):,} rows: {' -> '.join(perplexities) or 'not evaluated'}",
        "", "| setting | value |", "| --- | --- |", *(f"| {name} | {chosen[name]} |" for name in settings),
        "", "```python", *load, 'model = modify_llm.load_trained("DIR")  # with modify_llm.py, all techniques', "```",
        "", 'In the terminal: `python train_llm.py --adapter_path DIR --prompt "..."`', "",
    ])  # fmt: skip


def write_predictions(run: Run) -> None:
    """predictions.jsonl: the reference, the untouched base's answer and the tuned model's for a few rows."""
    pairs, decode = held_out_prompts(run), run.tokenizer.decode
    if not pairs:
        return
    tuned = [generate_text(run, run.model, prompt) for prompt, _ in pairs]
    chosen = argparse.Namespace(from_scratch=False, model_name_or_path=run.model.base_name, dropout=0.0)
    base = modify_llm.load_base(chosen).requires_grad_(False)
    prepare_model(base, run.args, run.runtime)
    with open(run.output_dir / "predictions.jsonl", "w", encoding="utf-8") as file:
        for (prompt, reference), (answer, stopped) in zip(pairs, tuned, strict=True):
            untuned, _ = generate_text(run, base, prompt)
            row = {"prompt": decode(prompt), "reference": decode(reference), "base": untuned, "tuned": answer}
            file.write(json.dumps(row | {"stopped": stopped}, ensure_ascii=False) + "\n")
    logger.info("%d of %d answers stopped by themselves", sum(s for _, s in tuned), len(tuned))


def plot_curves(output_dir: Path) -> None:
    """training_curves.png: loss, perplexity, learning rate and gradient norm over the optimizer steps."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training, held_out = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    titles = {"loss": "loss per token", "perplexity": "perplexity", "lr": "learning rate", "grad_norm": "gradient norm"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        axes.plot([r["step"] for r in training], [r[key] for r in training], color="#4c72b0", label="training")
        if held_out and f"eval_{key}" in held_out[0]:
            points = [r["step"] for r in held_out], [r[f"eval_{key}"] for r in held_out]
            axes.plot(*points, "o-", color="#c44e52", label="held out")
            axes.legend()
        axes.set(xlabel="optimizer step", ylabel=title)
        axes.grid(alpha=0.3)
        if key == "perplexity":
            axes.set_yscale("log")
    figure.savefig(output_dir / "training_curves.png", dpi=110)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(run: Run) -> None:
    """checkpoints/step_N: trainable weights, optimizer, random states, progress; what rotates out is removed."""
    runtime, step = run.runtime, run.progress.step
    tensors = {"trainable": run.trainable, "random": random_states(runtime)}
    if runtime.rank != 0:
        return
    tensors["optimizer"] = {
        f"{name}.{key}": value
        for name, parameter in run.trainable.items()
        for key, value in run.optimizer.state[parameter].items()
    }
    state = {"progress": asdict(run.progress), "settings": run.settings, "world_size": runtime.world_size}
    state |= {"dataset_sha256": run.dataset_hash, "base_fingerprint": run.model.base_fingerprint}
    state["grad_scaler"] = run.scaler.state_dict()
    with whole_directory(run.output_dir, f"checkpoints/step_{step:08d}") as directory:
        for name, group in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, directory / f"{name}.safetensors")
        modify_llm.write_json(directory / "state.json", state)
    others = [path for path in checkpoint_directories(run.output_dir) if checkpoint_step(path) != step]
    for path in others[run.args.save_total_limit - 1 :]:
        if checkpoint_step(path) not in (run.progress.best_step, run.resumed_from):
            try:
                trash = run.output_dir / f".trash_{path.name}"
                path.rename(trash)
                shutil.rmtree(trash)
            except OSError as error:
                logger.warning("%s: cannot be removed: %s", path, error)


def random_states(runtime: Runtime) -> dict[str, Tensor]:
    """The state of every process's generators, gathered."""
    own = {f"cpu.{runtime.rank}": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        own[f"cuda.{runtime.rank}"] = torch.cuda.get_rng_state(runtime.device)
    if runtime.world_size == 1:
        return own
    gathered: list[dict] = [{}] * runtime.world_size
    dist.all_gather_object(gathered, own)
    return {name: state for states in gathered for name, state in states.items()}


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """checkpoints/step_*, newest first."""
    found = [path for path in output_dir.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=checkpoint_step, reverse=True)


def resume(run: Run) -> None:
    """Goes on from --resume_from: under auto from the newest good checkpoint, with a warning for each bad one.

    Raises ValueError for a checkpoint of another run, or one asked for by its path that is not good.
    """
    wanted = run.args.resume_from
    root = run.output_dir if wanted == "auto" else Path(wanted)
    by_path = re.fullmatch(r"step_\d+", root.resolve().name)
    for path in [root] if by_path else checkpoint_directories(root):
        try:
            state = read_checkpoint(path)
            if not (another := difference(run, state)):
                check_tensors(run, state)
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            if by_path:
                raise ValueError(f"--resume_from {path}: {reason}") from None
            logger.warning("Checkpoint skipped: %s: %s", path, reason)
            continue
        if another:
            raise ValueError(f"--resume_from {path}: {another}")
        restore(run, state)
        logger.info("Resumed from %s at step %d", path, run.progress.step)
        return
    if wanted != "auto":
        raise ValueError(f"--resume_from {wanted}: no such directory, or no good checkpoint in it")
    logger.warning("--resume_from auto: no good checkpoint in %s, starting at step 0", run.output_dir)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, verified; nothing is unpickled. Raises ValueError."""
    verify_directory(path)
    state = modify_llm.read_json(path / "state.json")
    for name in ("trainable", "optimizer", "random"):
        state[name] = modify_llm.read_tensors(path / f"{name}.safetensors")
    fields = {"progress", "settings", "world_size", "dataset_sha256", "base_fingerprint", "grad_scaler"}
    if missing := fields - state.keys():
        raise ValueError(f"state.json lacks {min(missing)}")
    try:
        state["progress"] = Progress(**state["progress"])
    except TypeError as error:
        raise ValueError(f"state.json: {error}") from None
    for name, initial in asdict(Progress()).items():
        value = getattr(state["progress"], name)
        if type(value) is not type(initial) and not (initial is None and type(value) is float):
            raise ValueError(f"state.json: {name} is {value!r:.40}")
    if not isinstance(state["settings"], dict):
        raise ValueError("state.json: settings is no object")
    return state


def difference(run: Run, state: dict) -> str:
    """A checkpoint continues only the run that wrote it: what sets that one apart from this; nothing: ''."""
    for name, now in run.settings.items():
        before = state["settings"].get(name)
        if name not in FREE_TO_CHANGE and before != now:
            return f"was trained with --{name} {before}, not {now}"
    if state["world_size"] != run.runtime.world_size:
        return f"was trained by {state['world_size']} processes, not {run.runtime.world_size}"
    if state["dataset_sha256"] != run.dataset_hash:
        return "the dataset has changed since (its content hash differs)"
    if state["base_fingerprint"] != run.model.base_fingerprint:
        return "was trained on another base model"
    return ""


def check_tensors(run: Run, state: dict) -> None:
    """Raises ValueError, naming the tensor, unless all that this run trains is there in its shape, and no more."""
    if missing := {f"cpu.{rank}" for rank in range(run.runtime.world_size)} - state["random"].keys():
        raise ValueError(f"random.safetensors lacks {min(missing)}")
    expected = {"trainable": {name: p.shape for name, p in run.trainable.items()}, "optimizer": {}}
    if state["progress"].step:
        for name, p in run.trainable.items():
            expected["optimizer"] |= {f"{name}.step": (), f"{name}.exp_avg": p.shape, f"{name}.exp_avg_sq": p.shape}
    for kind, shapes in expected.items():
        if names := state[kind].keys() ^ shapes.keys():
            raise ValueError(f"{min(names)} is {'missing' if min(names) in shapes else 'not part of this run'}")
        for name, shape in shapes.items():
            tensor = state[kind][name]
            if tensor.shape != torch.Size(shape) or tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not torch.float32 {tuple(shape)}")
            if name.endswith(".step") and not 0 <= tensor <= state["progress"].step:
                raise ValueError(f"{name} is {tensor.item():g} at step {state['progress'].step}")
    try:
        torch.Generator().set_state(state["random"][f"cpu.{run.runtime.rank}"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"random.safetensors: {error}") from None


def restore(run: Run, state: dict) -> None:
    """Puts a checkpoint's tensors, progress and random state into the run."""
    run.progress, run.resumed_from = state["progress"], state["progress"].step
    modify_llm.put_tensors(run.model, state["trainable"], run.output_dir)
    for name, parameter in run.trainable.items() if run.progress.step else ():
        moments = {key: state["optimizer"][f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        run.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
    if state["grad_scaler"]:  # empty from a run that needed none, say on another device
        run.scaler.load_state_dict(state["grad_scaler"])
    runtime, states = run.runtime, state["random"]
    torch.set_rng_state(states[f"cpu.{runtime.rank}"])
    if runtime.device.type == "cuda" and f"cuda.{runtime.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{runtime.rank}"], runtime.device)


def finished(run: Run) -> bool:
    """Its newest good checkpoint is at the last step, and final/ verifies."""
    if run.resumed_from is None or (run.progress.step < run.total_steps and not run.progress.stopped_early):
        return False
    try:
        verify_directory(run.output_dir / "final")
    except ValueError:
        return False
    return not run.progress.evaluation_due


# ---- training --------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, total: int, args: argparse.Namespace) -> float:
    """The rate of optimizer step `step`, counted from 1 to `total`.

    Warm-up: peak x step / warmup_steps. Decay: from the peak, at the first step after it, to min_lr at the last.
    """
    peak, warmup = args.learning_rate, args.warmup_steps if args.scheduler in ("warmup_cosine", "linear") else 0
    if step <= warmup:
        return peak * step / warmup
    if args.scheduler == "constant":
        return peak
    done = (step - warmup - 1) / max(1, total - warmup - 1)
    share = 1 - done if args.scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
    return args.min_lr + (peak - args.min_lr) * share


def train_step(run: Run, wrapped: nn.Module, window: list[dict[str, Tensor]]) -> tuple[float, float]:
    """One optimizer step over the micro-batches of a window. Returns (learning rate, gradient norm).

    Loss: the sum over the labelled tokens of the window, on all processes, over their number, whatever the cut.
    """
    args, runtime, state = run.args, run.runtime, run.progress
    inputs = [part for batch in window for part in loss_inputs(batch, runtime, run.at_once)]
    own = sum(len(i["targets"]) for i in inputs), run.signal is not None
    counts = torch.tensor(own, dtype=torch.float32).to(runtime.device, non_blocking=True)  # labels, told to stop
    if runtime.world_size > 1:
        dist.all_reduce(counts)
    rate = learning_rate_at(state.step + 1, run.total_steps, args)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss_sum = torch.zeros((), device=runtime.device)
    for i, part in enumerate(inputs):
        last = i == len(inputs) - 1
        with nullcontext() if last or runtime.world_size == 1 else wrapped.no_sync():
            with runtime.autocast():
                loss = wrapped(**part)
            # DistributedDataParallel averages over the processes; the loss is their sum
            run.scaler.scale(loss * (runtime.world_size / counts[0].clamp(min=1))).backward()
        loss_sum += loss.detach()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.trainable.values(), args.max_grad_norm or math.inf)
    if runtime.world_size > 1:
        dist.all_reduce(loss_sum)
    # The one wait for the device in a step (with fp16, its scaler waits too).
    loss_value, norm_value, targets, told_to_stop = torch.stack([loss_sum, norm.float(), *counts]).tolist()
    run.stopping = told_to_stop > 0  # one process was told: all stop at the same step
    if not math.isfinite(loss_value):
        raise RuntimeError(f"the loss is {loss_value} at step {state.step + 1}: try a lower --learning_rate")
    if not math.isfinite(norm_value) and not run.scaler.is_enabled():
        raise RuntimeError(f"the gradient norm is {norm_value} at step {state.step + 1}: try a lower --learning_rate")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1e-3:
        raise RuntimeError("fp16 gradients overflow again and again: use --precision fp32 or bf16")
    run.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.loss_sum += loss_value
    state.target_count += int(targets)
    return rate, norm_value


def run_evaluation(run: Run, summed_loss: SummedLoss, epoch: int) -> bool:
    """Evaluates, logs, answers the held-out prompts, keeps the best model and counts towards early stopping.

    Returns whether it came to its end: it breaks off when the run is told to stop.
    """
    state, runtime = run.progress, run.runtime
    loss, tokens = evaluate(summed_loss, run.eval_loader, runtime, run.told_to_stop)
    if run.told_to_stop():
        return False
    if not math.isfinite(loss):
        raise RuntimeError(f"the held-out loss is {loss} at step {state.step}")
    row = {"step": state.step, "epoch": epoch, "eval_loss": loss, "eval_perplexity": perplexity(loss)}
    write_metrics(run, row | {"eval_tokens": tokens})
    plain.info(
        "Epoch %d | Step %4d | Held-out loss: %.4f | Held-out PPL: %.2f | %s tokens",
        epoch, state.step, loss, perplexity(loss), f"{tokens:,}",
    )  # fmt: skip
    state.last_loss = loss
    if state.step == 0:
        state.first_loss = loss
        return True
    if runtime.rank == 0:
        for prompt, _ in held_out_prompts(run):
            answer, _ = generate_text(run, run.model, prompt)
            text = run.tokenizer.decode(prompt)
            logger.info("Sample: %.160r -> %.160r", text[-60:], answer)
            if run.writer:
                run.writer.add_text("samples", f"**{text}** {answer}", state.step)
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
        if runtime.rank == 0:
            write_model(run, "best")
    else:
        state.evaluations_without_gain += 1
        patience = run.args.early_stopping_patience
        state.stopped_early = bool(patience) and state.evaluations_without_gain >= patience
    return True


def train(run: Run) -> None:
    """The loop: epochs of windows of micro-batches, an optimizer step each, then whatever is due."""
    args, runtime, state, total, steps = run.args, run.runtime, run.progress, run.total_steps, run.steps_per_epoch
    if args.compile:
        for block in run.model.transformer.h:  # what lies between the attentions, whose layout changes by the batch
            if isinstance(block.mlp.act, nn.GELU):
                block.mlp.act = SigmoidGELU()
            block.mlp.compile(dynamic=True)
    summed_loss = wrapped = SummedLoss(run.model).train()
    if runtime.world_size > 1:
        wrapped = DistributedDataParallel(summed_loss, broadcast_buffers=False)
    bar = tqdm(total=total, initial=state.step, desc="training", disable=None if runtime.rank == 0 else True)
    width, batches, clock, tokens = max(4, len(str(steps))), None, time.perf_counter(), 0
    while True:
        epoch, step_of_epoch = divmod(state.step, steps)
        if state.evaluation_due and not run.told_to_stop():
            if run.eval_loader and not run_evaluation(run, summed_loss, max(0, state.step - 1) // steps):
                continue  # told to stop meanwhile: the evaluation stays due
            state.evaluation_due = False
            if state.step and (not args.save_interval or state.step >= total or state.stopped_early):
                save_checkpoint(run)
            clock, tokens = time.perf_counter(), 0
        if run.told_to_stop():
            save_checkpoint(run)
            number = signal.Signals(run.signal or signal.SIGTERM)
            hint = "" if args.demo else "; --resume_from auto goes on"
            logger.info("Stopped by %s at step %d%s", number.name, state.step, hint)
            raise Stopped(number)
        if state.step >= total or state.stopped_early:
            break
        if batches is None or step_of_epoch == 0:
            run.loader.batch_sampler.set_epoch(epoch, step_of_epoch)
            batches = iter(run.loader)
        window = list(itertools.islice(batches, args.gradient_accumulation_steps))
        tokens += sum(int(batch["attention_mask"].sum()) for batch in window)
        rate, norm = train_step(run, wrapped, window)
        bar.update()
        step, end_of_epoch = state.step, step_of_epoch + 1 == steps
        if step % args.log_interval == 0 or step >= total:
            (all_tokens,) = runtime.sum_over_ranks(tokens)
            loss, speed = state.loss_sum / max(1, state.target_count), all_tokens / (time.perf_counter() - clock)
            row = {"step": step, "epoch": epoch, "loss": loss, "perplexity": perplexity(loss), "lr": rate}
            write_metrics(run, row | {"grad_norm": norm, "tokens_per_second": speed})
            plain.info(
                "Epoch %d | Step %*d/%d | Loss: %.4f | PPL: %.2f | LR: %.2e | Grad: %.3f | %s tok/s",
                epoch, width, step_of_epoch + 1, steps, loss, perplexity(loss), rate, norm, f"{speed:,.0f}",
            )  # fmt: skip
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s")
            state.loss_sum, state.target_count, clock, tokens = 0.0, 0, time.perf_counter(), 0
        state.evaluation_due = step >= total or (step % args.eval_interval == 0 if args.eval_interval else end_of_epoch)
        if args.save_interval and step % args.save_interval == 0 and step < total:
            save_checkpoint(run)
    bar.close()


# ---- from the command line to final/ ---------------------------------------------------------------------------------


def prepare(run: Run) -> None:
    """Everything that can be found wrong before the first step, in memory: nothing is written yet."""
    args, runtime = run.args, run.runtime
    if not (args.adapter_path or args.from_scratch):
        modify_llm.locate(args.model_name_or_path)  # weights out of reach are told before the rows are read
    run.tokenizer = tokenizer_for(args)
    run.train_rows, run.eval_rows = load_rows(args, run.tokenizer)
    hashes = run.train_rows.content_hash() + run.eval_rows.content_hash()
    run.dataset_hash = hashlib.sha256(hashes.encode()).hexdigest()
    logger.info("🔧 Using device: %s", runtime.device)
    run.model = build_model(args, run.output_dir)
    check_fits(run, args.max_length)
    total, trainable = run.counts = modify_llm.parameter_counts(run.model)
    counts = f"   Total: {total:,}\n   Trainable: {trainable:,} ({trainable / total:.2%})"
    logger.info("📊 Model Parameters:\n%s", counts)
    prepare_model(run.model, args, runtime)
    if trainable > total / 10:
        run.at_once = sys.maxsize  # each part would cast the weights again, and add another gradient to the last
    run.trainable = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    run.optimizer = make_optimizer(run.model, args)
    run.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    run.loader = make_loader(run, run.train_rows, accumulation_steps=args.gradient_accumulation_steps)
    run.eval_loader = make_loader(run, run.eval_rows, shuffle=False) if len(run.eval_rows) else None
    run.steps_per_epoch = run.loader.batch_sampler.steps
    run.total_steps = args.max_steps or args.epochs * run.steps_per_epoch
    if args.warmup_steps is None:
        args.warmup_steps = min(100, run.total_steps // 10)
    elif args.warmup_steps >= run.total_steps and args.scheduler in ("warmup_cosine", "linear"):
        logger.warning(
            "--warmup_steps %d: the run ends at step %d, still warming up", args.warmup_steps, run.total_steps
        )
    run.settings["warmup_steps"] = args.warmup_steps
    logger.info("🔢 Training batches: %s", f"{run.steps_per_epoch:,}")
    plain.info(summary(run))
    for text in args.prompt:
        prompt_ids(run, text)  # raises for one that cannot be put, before the run and not after it
    if args.overwrite_output_dir:
        written = [path.resolve() for pattern in OWN for path in run.output_dir.glob(pattern)]
        for used in filter(None, (args.adapter_path, run.model.base_path, args.dataset_path, args.eval_dataset_path)):
            if any(Path(used).resolve().is_relative_to(path) for path in written):
                raise ValueError(f"--overwrite_output_dir: would remove {used}, which this run needs")
    torch.manual_seed(args.seed + runtime.rank)
    if args.resume_from:
        resume(run)


def summary(run: Run) -> str:
    """What is about to happen, in a few lines."""
    args, runtime, rows = run.args, run.runtime, run.train_rows
    total, trainable = run.counts
    stored = sum(p.numel() * p.element_size() for p in run.model.parameters())
    tokens, labels = int(rows.lengths.sum()), int(rows.label_counts.sum())
    packed = f"{1 - tokens / (len(rows) * args.max_length):.0%} padding saved of {args.max_length} a row"
    batch = f"{args.batch_size} x {args.gradient_accumulation_steps} x {runtime.world_size}"
    rate = f"{args.scheduler} from {args.learning_rate:g}, warm-up {args.warmup_steps:,}"
    name = run.model.base_name or "random weights"
    lines = {
        "Device": f"{runtime.device}, {str(runtime.dtype).removeprefix('torch.')}, processes: {runtime.world_size}",
        "Model": f"{name}, {run.model.modification['modification_type']}: {trainable / total:.2%} trains",
        "Rows": f"{len(rows):,} to train on, {len(run.eval_rows):,} held out",
        "Tokens": f"{tokens:,} an epoch, {labels:,} with a label; {packed}",
        "Steps": f"{run.total_steps:,} of {batch} rows; {rate}",
        "Memory": f"{(stored + 12 * trainable) / 1e9:.2f} GB for weights, gradients and AdamW; activations come on top",
    }
    return "\n".join(f"   {name + ':':<8} {line}" for name, line in lines.items())


def catch_signals(run: Run) -> None:
    """Until the run closes, SIGINT and SIGTERM only leave a note for the training loop."""

    def stop(number: int, _frame: object) -> None:
        if run.signal and number == signal.SIGINT:
            os._exit(130)  # asked twice: leave at once, the last checkpoint is whole
        run.signal = number

    for number in (signal.SIGINT, signal.SIGTERM):
        run.closing.callback(signal.signal, number, signal.signal(number, stop))


def finish(run: Run, point_on: bool) -> None:
    """final/, the curves, the predictions and the closing words; point_on: with where all lies, and how to use it."""
    state, output_dir = run.progress, run.output_dir
    if run.runtime.rank != 0:
        return
    plot_curves(output_dir)
    write_predictions(run)
    write_model(run, "final")  # last, since a run whose final/ is whole counts as finished
    if state.best_loss is not None:
        before, after, best = (perplexity(loss) for loss in (state.first_loss, state.last_loss, state.best_loss))
        words = "Held-out perplexity: %.2f before, %.2f after %d steps, best %.2f at step %d"
        plain.info(words, before, after, state.step, best, state.best_step)
    minutes, seconds = divmod(round(time.perf_counter() - run.started), 60)
    plain.info("Time: %d min %02d s", minutes, seconds)
    if point_on:
        written = "best/, final/, metrics.jsonl, training_curves.png, predictions.jsonl"
        plain.info("Written to %s: %s", output_dir, written)
        use = output_dir / ("best" if (output_dir / "best").exists() else "final")
        plain.info('Try it: python train_llm.py --adapter_path %s --prompt "..."', use)


def train_model(args: argparse.Namespace, runtime: Runtime, point_on: bool = True) -> None:
    """One training run, from flags that are in range to final/.

    Raises ValueError or OSError for bad input, with nothing written; RuntimeError for a failure later on; Stopped.
    """
    run = Run(args, runtime)
    with run.closing:
        claim_directory(run, create=False)
        if runtime.world_size > 1:
            dist.barrier()
        prepare(run)
        if finished(run):
            logger.info("The run in %s is finished; nothing to do", run.output_dir)
            answer_prompts(run)
            return
        claim_directory(run, create=True)
        try:
            start_records(run)
            if args.from_scratch:
                save_scratch_base(run)
            catch_signals(run)
            train(run)
            finish(run, point_on)
            answer_prompts(run)
        except (ValueError, OSError, SafetensorError) as error:  # not the input's fault any more
            raise RuntimeError(error) from error


def use_model(args: argparse.Namespace, runtime: Runtime) -> None:
    """--eval_only and --prompt without training: what --adapter_path holds, or the untouched base."""
    run = Run(args, runtime)
    run.tokenizer = tokenizer_for(args)
    torch.manual_seed(args.seed)
    if args.adapter_path:
        run.model = load_trained(args.adapter_path, args.model_name_or_path)
    else:
        run.model = modify_llm.load_base(args).requires_grad_(False)
    prepare_model(run.model, args, runtime)  # at the precision that it was trained and evaluated with
    run.model.requires_grad_(False)
    check_fits(run, args.max_length if args.eval_only else 1)
    if args.eval_only:
        _, rows = load_rows(args, run.tokenizer)
        loss, tokens = evaluate(SummedLoss(run.model), make_loader(run, rows, shuffle=False), runtime)
        line = "Held-out loss: %.4f | Held-out PPL: %.2f | %s tokens of %s rows"
        plain.info(line, loss, perplexity(loss), f"{tokens:,}", f"{len(rows):,}")
    answer_prompts(run)


def demo(args: argparse.Namespace, runtime: Runtime) -> None:
    """A tiny GPT-2 from scratch on one half of the bundled sample, then LoRA on it with the other half."""
    if args.output_dir == "./outputs":
        args.output_dir = "./outputs/demo"
    with suppress(ValueError, KeyError, TypeError):  # what an earlier demo wrote is the demo's to overwrite
        args.overwrite_output_dir |= modify_llm.read_json(Path(args.output_dir) / "run.json")["settings"]["demo"]
    args.from_scratch = True
    output_dir, rows = Path(args.output_dir), json.loads(data_pipeline.BUNDLED_SAMPLE.read_text(encoding="utf-8"))
    rows = [row for row in rows if len(row["output"]) < 200]  # what a model of this size can learn in half a minute
    own = [f"--{name}={getattr(args, name)}" for name in ("device", "precision", "seed")]
    common = ["--demo", "--max_length=160", "--eval_fraction=0.1", "--num_samples=1", "--max_new_tokens=40"]
    common += ["--batch_size=4", *own]
    question = "Q: {instruction} {input}\nA:"
    run = Run(args, runtime)
    with run.closing, tempfile.TemporaryDirectory() as scratch:
        claim_directory(run, create=True)
        clear_directory(output_dir)
        for name, half in (("base", rows[::2]), ("tune", rows[1::2])):
            Path(scratch, f"{name}.json").write_text(json.dumps(half), encoding="utf-8")
        plain.info("Demo, part 1 of 2: a tiny GPT-2, from random weights, in full\n")
        tiny = ["--hidden_size=128", "--num_hidden_layers=2", "--num_attention_heads=4"]
        tiny += ["--max_position_embeddings=160"]
        learn = ["--modification_type=full", "--epochs=8", "--learning_rate=2e-3", "--eval_interval=172"]
        data = [f"--dataset_path={scratch}/base.json", f"--text_format=||{question} {{output}}"]
        base = ["--from_scratch", *tiny, *learn, *data, *common, f"--output_dir={scratch}/run"]
        train_model(parse(base), runtime, point_on=False)
        shutil.move(f"{scratch}/run/best", output_dir / "base")
        plain.info("\nDemo, part 2 of 2: LoRA on that base\n")
        learn = [f"--model_name_or_path={output_dir}/base", "--epochs=6", "--learning_rate=1e-2", "--eval_interval=129"]
        data = [f"--dataset_path={scratch}/tune.json", f"--text_format={question}|| {{output}}"]
        train_model(parse([*learn, *data, *common, f"--output_dir={output_dir}"]), runtime)
    plain.info("\nA model of this size learns the form of an answer, not its facts:\n")
    question = '{"instruction": "Is this a fruit or a vegetable?", "input": "banana"}'
    use_model(parse(["--adapter_path", str(output_dir / "final"), "--prompt", question, *own]), runtime)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; what goes wrong is told in one line on stderr."""
    args = parse(argv)
    set_up_logging(int(os.environ.get("RANK", 0)))
    for line in idle_flags(args):
        logger.warning(line)
    try:
        if args.demo:
            work = demo
        elif uses_only(args):
            work = use_model
        else:
            work = train_model
        work(args, choose_runtime(args))
        return 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:  # before training has begun there is nothing to save
        return 130
    except (ValueError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(OUT_OF_MEMORY, reason):
            hint = "lower --batch_size (and raise --gradient_accumulation_steps) or --max_length, or --precision bf16"
            reason = f"out of memory: {hint}: {reason}"
        print(f"train_llm.py: error: {reason}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError | MemoryError) else 2  # 2: the input's or the flags' fault
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
