"""Fine-tune GPT-2 on instruction rows with LoRA, adapters, prefixes, freezing or in full.

    python train_llm.py --demo    # no download, a minute on a CPU
    python train_llm.py --dataset_path alpaca_data.json --output_dir ./outputs
    python train_llm.py --dataset_path alpaca_data.json --resume_from auto
    python train_llm.py --adapter_path outputs/best --prompt "Name a colour."
    python train_llm.py --dataset_path alpaca_data.json --compare
    torchrun --nproc_per_node=2 train_llm.py --dataset_path alpaca_data.json

There is one loop for all techniques (`train`): a technique only decides which parameters train.
A batch's way: the loader's padded rows -> loss_inputs -> SummedLoss -> train_step. The rooms, of
which the first six are the heart:

    the loss                   SummedLoss, ChunkedCrossEntropy, loss_inputs
    attention                  causal_attention
    the step                   train_step, make_optimizer
    the schedule               learning_rate_at
    the loop                   train
    evaluation                 evaluate, run_evaluation
    a run                      train_model: from flags that are in range to final/
    what a run writes          run.json, metrics.jsonl, best/, final/, whole or not at all
    checkpoints and resuming   save_checkpoint, resume
    answers                    prompt_ids, generate_answers
    comparing techniques       compare
    the machine, flags, the script
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import errno
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from functools import partial
from importlib.util import find_spec
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import pandas as pd
import torch
import torch.distributed as dist
import transformers
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

if __name__ == "__main__":  # `python -I` and PYTHONSAFEPATH leave a script's directory out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import data_pipeline
import modify_llm
from data_pipeline import (
    DATA_FLAGS,
    IGNORED,
    WIDTH_MULTIPLE,
    AlpacaDataset,
    encode_prompt,
    final_dataset_loader,
    load_dataset,
    load_tokenizer,
    model_tokenizer,
)
from modify_llm import (
    TECHNIQUES,
    Flag,
    add_flags,
    final_modify,
    load_trained,
    names,
    nonempty,
    number,
    save_trained,
    trained_settings,
)

Args = argparse.Namespace  # all flags, by name
logger = logging.getLogger(__name__)
table = logging.getLogger("table")  # lines without a prefix


# ---- the loss ------------------------------------------------------------------------------------


class SummedLoss(nn.Module):
    """The summed loss over a batch's labelled tokens: `model(**batch).loss` times their number.
    (A module, so that DistributedDataParallel can wrap it.)"""

    def __init__(self, model: GPT2LMHeadModel, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor,
        correct: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """See loss_inputs for the arguments; correct: ChunkedCrossEntropy's."""
        transformer, device = self.model.transformer, input_ids.device.type
        # Embeddings, not ids: transformers would look for padding among ids, and wait for a GPU.
        # In fp32, so that this is the dtype of the residual stream whatever is frozen.
        embeddings = transformer.wte(input_ids).float()  # (batch, width, hidden size)
        hidden = transformer(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, positions)  # (labelled tokens, hidden size)
        # Evaluation takes fp32 logits: in bf16 those near -100 are 0.5 apart.
        dtype = torch.get_autocast_dtype(device) if torch.is_grad_enabled() else torch.float32
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(dtype)
        with torch.autocast(device, enabled=False):
            weight = self.model.lm_head.weight
            return ChunkedCrossEntropy.apply(
                hidden, weight, targets, torch.is_grad_enabled(), self.label_smoothing, correct
            )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of hidden states, without ever holding all the logits.

    The plain version, to which a test holds it equal:

        F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    A chunk of rows at a time: logits, fp32 log-sum-exp, and, while they are at hand, the gradient
    softmax - one-hot multiplied on to `hidden` and `weight`. The loss is a sum, so the backward
    pass only scales what is ready. `correct`, where given, gets the number of targets whose logit
    is the largest.

    With label smoothing the gradient is that of F.cross_entropy's `label_smoothing` (Szegedy et
    al., 2016, section 7; microsoft/LoRA's model.py), for which the target of a row of logits is
    (1 - label_smoothing) x one-hot + label_smoothing / vocabulary. The value stays the plain loss,
    so that logged losses can be compared.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, with_grad: bool,
        label_smoothing: float = 0.0, correct: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        # hidden (rows, hidden size), weight (vocabulary, hidden size), targets (rows,)
        weight, (hidden_needs, weight_needs, *_) = weight.to(hidden.dtype), ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros_like(loss)
        hidden_grad = torch.empty_like(hidden) if with_grad and hidden_needs else None
        weight_grad = None
        if with_grad and weight_needs:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        # rows of logits at a time, and of fp32 passes over them, which fit a CPU's cache
        chunk, strip = (512, 8) if hidden.device.type == "cpu" else (2048, 2048)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.t()  # (chunk, vocabulary)
            for first in range(0, len(logits), strip):
                part = logits[first : first + strip]
                target, exact = targets[rows][first : first + strip, None], part.float()
                at_target, largest = exact.gather(1, target), exact.amax(1, keepdim=True)
                softmax = exact.softmax(1)
                log_sum_exp = largest - softmax.amax(1, keepdim=True).log()
                loss += (log_sum_exp - at_target).sum()
                if correct is not None:
                    hits += (at_target == largest).sum()
                if hidden_grad is not None or weight_grad is not None:
                    softmax.scatter_(1, target, label_smoothing - 1, reduce="add")
                    if label_smoothing:
                        softmax -= label_smoothing / len(weight)
                    part.copy_(softmax)  # the logits become their gradient
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad += logits.t() @ hidden[rows]
        if correct is not None:
            correct.append(hits)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            # Of one dimension, the factor is fp32 in the product; of none it would be rounded.
            hidden_grad = (hidden_grad * scale.view(1)).to(hidden_grad.dtype)
        weight_grad = None if weight_grad is None else weight_grad * scale
        return hidden_grad, weight_grad, None, None, None, None


CPU_TOKENS = 1536  # of a batch at once: more are not faster, and their activations fill the memory
PADDING = 0.15  # of a part's tokens: beyond it, another part costs less
SMALL_PART = 256  # tokens: below it, another part costs more than any padding


def loss_inputs(
    batch: dict[str, Tensor], runtime: Runtime, max_tokens: float | None = None
) -> list[dict[str, Tensor]]:
    """A batch of the data pipeline as SummedLoss takes it, on the device, in parts whose sums are
    those of the whole. max_tokens: of a part (CPU_TOKENS; elsewhere any number).

    input_ids (rows, width); positions: the flat places whose next token carries a label, so that
    the head is computed there alone; targets: those labels. All is found on the CPU, where the
    batch is, so that a GPU is never waited for.
    """
    if max_tokens is None:
        max_tokens = CPU_TOKENS if runtime.device.type == "cpu" else math.inf
    lengths, parts = batch["attention_mask"].sum(1).tolist(), []
    next_labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # what a place predicts
    for rows in cut_rows(lengths, max_tokens):
        width = math.ceil(lengths[rows[0]] / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        labels = next_labels[rows, :width].flatten()
        positions = (labels != IGNORED).nonzero().squeeze(1)
        input_ids = batch["input_ids"][rows, :width]
        together = torch.cat([input_ids.flatten(), positions, labels[positions]])
        sizes = [input_ids.numel(), len(positions), len(positions)]
        flat, positions, targets = to_device(together, runtime).split(sizes)  # one copy
        input_ids = flat.view(input_ids.shape)
        parts.append({"input_ids": input_ids, "positions": positions, "targets": targets})
    return parts


def cut_rows(lengths: list[int], max_tokens: float) -> list[list[int]]:
    """Row numbers in parts, from long to short rows: a new part where the tokens would pass
    `max_tokens`, or where padding to the longest row would pass 15% (as in small sets)."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        rows = [*parts[-1], row] if parts else [row]
        padded, tokens = len(rows) * lengths[rows[0]], sum(lengths[r] for r in rows)
        if parts and padded <= min(max_tokens, max(SMALL_PART, (1 + PADDING) * tokens)):
            parts[-1] = rows
        else:
            parts.append([row])
    return parts


def to_device(tensor: Tensor, runtime: Runtime) -> Tensor:
    """Copies to a GPU without waiting: from pinned memory, which nobody else is given meanwhile.
    A Mac has none, and would read what was freed."""
    if runtime.device.type in ("cpu", "mps"):
        return tensor.to(runtime.device)
    return tensor.pin_memory().to(runtime.device, non_blocking=True)


# ---- attention -----------------------------------------------------------------------------------


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: query, key, value (batch, heads, length, head size) to
    (batch, length, heads, head size). The queries stand at the end of the keys, of which there are
    more where a prefix or a cache comes first."""
    queries, keys = query.shape[2], key.shape[2]
    # PyTorch's own `is_causal` has the queries at the start of the keys.
    bias = causal_lower_right(queries, keys) if 1 < queries < keys else None
    return sdpa_attention_forward(module, query, key, value, bias, dropout, scaling)


@contextmanager
def attention_without_mask(model: GPT2LMHeadModel) -> Iterator[None]:
    """Inside, no mask is made: right padding comes after all that a real token sees.

    Registered under a name without a mask function; under "sdpa" transformers looks for padding,
    and a GPU is waited for in every micro-batch.
    """
    AttentionInterface.register("causal", causal_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("causal")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ---- the step ------------------------------------------------------------------------------------


def train_step(
    run: Run, wrapped: nn.Module, window: list[dict[str, Tensor]]
) -> tuple[float, float]:
    """One optimizer step over a window of micro-batches: (learning rate, gradient norm). The loss
    is the sum over the labelled tokens of the window, on all processes, over their number."""
    args, runtime, state = run.args, run.runtime, run.progress
    # Where most of the model trains, each part more would add a gradient of the whole to the last.
    max_tokens = math.inf if run.counts[1] > run.counts[0] / 10 else None
    parts = [part for batch in window for part in loss_inputs(batch, runtime, max_tokens)]
    label_count = torch.tensor(float(sum(len(part["targets"]) for part in parts)))
    label_count = to_device(label_count, runtime)
    totals = to_device(torch.tensor([0.0, run.signal is not None]), runtime)  # loss, stop asked for
    if runtime.world_size > 1:
        dist.all_reduce(label_count)
    # DistributedDataParallel averages over the processes; the loss is their sum.
    weight = runtime.world_size / label_count.clamp(min=1)
    for i, part in enumerate(parts, 1):
        synced = i == len(parts) or runtime.world_size == 1  # gradients, once a window
        with nullcontext() if synced else wrapped.no_sync():
            with runtime.autocast():
                loss = wrapped(**part)  # the sum over the part's labelled tokens
            run.scaler.scale(loss * weight).backward()
        totals[0] += loss.detach()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.trainable.values(), args.max_grad_norm or math.inf)
    if runtime.world_size > 1:
        dist.all_reduce(totals)
    # The one wait for the device in a step.
    loss_sum, stop, labels, grad_norm = torch.stack([*totals, label_count, norm.float()]).tolist()
    run.stopping = stop > 0  # one process was told: all stop after the same step
    refuse_non_finite(loss_sum, grad_norm, state.step + 1, runtime.fp16)
    rate = learning_rate_at(state.step + 1, run.total_steps, args)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    run.scaler.step(run.optimizer)  # leaves out a step whose fp16 gradients overflowed
    run.scaler.update()
    if not math.isfinite(grad_norm) and run.scaler.get_scale() < 1e-3:  # asking makes it wait
        raise RuntimeError("fp16 gradients overflow again and again: use --precision fp32 or bf16")
    run.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.loss_sum += loss_sum
    state.target_count += int(labels)
    return rate, grad_norm


def refuse_non_finite(loss: float, grad_norm: float, step: int, fp16: bool) -> None:
    """Raises RuntimeError before such a step is taken. fp16: overflowing gradients are usual."""
    for name, value in (("loss", loss), ("gradient norm", 0.0 if fp16 else grad_norm)):
        if not math.isfinite(value):
            advice = "try a lower --learning_rate"
            raise RuntimeError(f"the {name} is {value} at step {step}: {advice}")


def make_optimizer(model: GPT2LMHeadModel, args: Args) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no decay on biases, LayerNorms and other 1-D ones, nor
    on prefixes, as in Li & Liang's code: over a long run it would undo them. LoRA's B may learn at
    a multiple of A's rate (LoRA+, Hayou et al., 2024)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and ".prefix." not in name
            lr_ratio = args.lora_plus_ratio if name.endswith(".lora_B") else 1.0
            alike = (args.weight_decay if decays else 0.0, lr_ratio)
            groups.setdefault(alike, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "lr_ratio": lr_ratio}
         for (decay, lr_ratio), group in groups.items()],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True,
    )  # fmt: skip


# ---- the schedule --------------------------------------------------------------------------------


def learning_rate_at(step: int, total: int, args: Args) -> float:
    """The rate of optimizer step `step`, counted from 1 to `total`.

    Warm-up: peak x step / warmup_steps; the peak is step warmup_steps, or the first without a
    warm-up. From there on as transformers' schedulers: the decay is divided by the number of
    steps from the peak on, so that min_lr would be the rate of the step after the last.
    """
    peak, warmup = args.learning_rate, 0 if args.scheduler == "cosine" else args.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if args.scheduler == "constant":
        return peak
    peak_step = max(1, warmup)
    done = (step - peak_step) / (total - peak_step + 1)
    share = 1 - done if args.scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
    return args.min_lr + (peak - args.min_lr) * share


def set_warmup(run: Run) -> None:
    """A tenth of the run, at most 100 steps, unless given; none for a constant rate. A warning
    where it never ends."""
    args, total = run.args, run.total_steps
    if args.warmup_steps is None:
        args.warmup_steps = 0 if args.scheduler == "constant" else min(100, total // 10)
    elif args.warmup_steps >= total and args.scheduler != "cosine":
        endless = "--warmup_steps %d: the run ends at step %d, still warming up"
        logger.warning(endless, args.warmup_steps, total)


# ---- the loop ------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """The loop: evaluate, save and stop where these are due, then take a step and log it.

    An evaluation comes before the first step too, so it stands at the head of the loop. Raises
    Stopped after a signal, RuntimeError for a loss that is no number.
    """
    args, state, runtime = run.args, run.progress, run.runtime
    summed_loss = wrapped = SummedLoss(run.model, args.label_smoothing).train()
    if runtime.world_size > 1:
        wrapped = DistributedDataParallel(summed_loss, gradient_as_bucket_view=True)
    steps, saved_step, clock, tokens = windows(run), state.step, time.perf_counter(), 0
    quiet = None if runtime.rank == 0 else True
    bar = tqdm(total=run.total_steps, initial=state.step, desc="training", disable=quiet)
    while True:
        evaluated = state.evaluation_due and not run.told_to_stop()
        if evaluated:
            run_evaluation(run, summed_loss)

        ended = state.step >= run.total_steps or state.stopped_early
        if run.told_to_stop() or checkpoint_due(run, evaluated, ended, saved_step):
            save_checkpoint(run)  # before all that may fail
            saved_step = state.step
            if run.told_to_stop():
                raise Stopped(run.signal or signal.SIGTERM)
        if evaluated:
            attempt("samples", show_samples, run)
            keep_best(run)
            clock, tokens = time.perf_counter(), 0
        if ended:
            break

        window = next(steps)
        tokens += sum(int(batch["attention_mask"].sum()) for batch in window)
        rate, norm = train_step(run, wrapped, window)
        bar.update()

        last, interval = state.step >= run.total_steps, args.eval_interval
        if state.step % args.log_interval == 0 or last:
            elapsed = time.perf_counter() - clock
            state.seconds += elapsed
            state.peak_memory_gb = max(state.peak_memory_gb, peak_memory(runtime))
            speed = runtime.sum_over_ranks(tokens)[0] / elapsed
            loss = log_training(run, rate, norm, speed)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s")
            clock, tokens = time.perf_counter(), 0
        at_interval = state.step % (interval or run.steps_per_epoch) == 0
        state.evaluation_due = last or at_interval
    bar.close()


def windows(run: Run) -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each optimizer step from the run's on."""
    epoch, first_step = divmod(run.progress.step, run.steps_per_epoch)
    while True:
        run.loader.batch_sampler.set_epoch(epoch, first_step)
        batches = iter(run.loader)
        for _ in range(first_step, run.steps_per_epoch):
            yield list(itertools.islice(batches, run.args.gradient_accumulation_steps))
        epoch, first_step = epoch + 1, 0


def checkpoint_due(run: Run, evaluated: bool, ended: bool, saved_step: int) -> bool:
    """After each evaluation, or each --save_interval steps; always at the end."""
    step, interval = run.progress.step, run.args.save_interval
    if evaluated and step > 0 and (ended or not interval):
        return True
    return bool(interval) and step > saved_step and step % interval == 0


def log_training(run: Run, rate: float, norm: float, speed: float) -> float:
    """The row and the line of the steps since the last one: returns their loss."""
    state = run.progress
    loss = state.loss_sum / max(1, state.target_count)
    row = {"step": state.step, "epoch": run.epoch_of(state.step)}
    row |= {"loss": loss, "perplexity": perplexity(loss)}
    row |= {"lr": rate, "grad_norm": norm, "tokens_per_second": speed}
    if run.runtime.device.type == "cuda":
        row["peak_memory_gb"] = peak_memory(run.runtime)
    write_metrics(run, row)
    table.info(
        "%s | Loss: %.4f | PPL: %.2f | LR: %.2e | Grad: %.3f | %s tok/s",
        run.place(state.step), loss, perplexity(loss), rate, norm, f"{speed:,.0f}",
    )  # fmt: skip
    state.loss_sum, state.target_count = 0.0, 0
    return loss


# ---- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    summed_loss: SummedLoss, loader: DataLoader, runtime: Runtime,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int, float]:  # fmt: skip
    """(mean loss over the labelled tokens of all held-out rows, their number, the share of them
    that is the likeliest next token), over all processes.

    stop: asked before each batch; once it says so, the rest is left out.
    """
    training = summed_loss.training
    summed_loss.eval()
    losses, correct, tokens = [torch.zeros((), device=runtime.device)], [], 0
    quiet = None if runtime.rank == 0 else True
    with attention_without_mask(summed_loss.model):
        for batch in tqdm(loader, desc="evaluating", leave=False, disable=quiet):
            if stop():
                break
            for inputs in loss_inputs(batch, runtime):
                with runtime.autocast():
                    losses.append(summed_loss(**inputs, correct=correct))
                tokens += len(inputs["targets"])
    summed_loss.train(training)
    values = torch.stack([*losses, *correct]).cpu().double()  # the only wait for a GPU
    summed, hits = values[: len(losses)].sum().item(), values[len(losses) :].sum().item()
    total, count, right = runtime.sum_over_ranks(summed, tokens, hits)
    return total / max(1, count), int(count), right / max(1, count)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def run_evaluation(run: Run, summed_loss: SummedLoss) -> None:
    """Evaluates, logs and counts towards early stopping. Stays due where a signal breaks it off."""
    state, patience = run.progress, run.args.early_stopping_patience
    if run.eval_loader:
        stop = run.stop_evaluating
        loss, tokens, accuracy = evaluate(summed_loss, run.eval_loader, run.runtime, stop)
        if run.told_to_stop():
            return
    state.evaluation_due = False
    if not run.eval_loader:
        return
    if not math.isfinite(loss):
        raise RuntimeError(f"the held-out loss is {loss} at step {state.step}")
    row = {"step": state.step, "epoch": run.epoch_of(state.step), "eval_loss": loss}
    row |= {"eval_perplexity": perplexity(loss), "eval_accuracy": accuracy}
    write_metrics(run, row | {"eval_tokens": tokens})
    table.info(
        "%s | Held-out loss: %.4f | Held-out PPL: %.2f | %s tokens, %.1f%% right",
        run.place(state.step), loss, perplexity(loss), f"{tokens:,}", 100 * accuracy,
    )  # fmt: skip
    before, state.last_loss = state.last_loss, loss
    if state.step == 0:
        state.first_loss = loss
        return
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
    else:
        state.evaluations_without_gain += 1
        state.stopped_early = 0 < patience <= state.evaluations_without_gain
    worse = state.first_loss is not None and before <= state.first_loss < loss
    if worse or state.evaluations_without_gain == 2:
        logger.warning(
            "The held-out loss %s: try a lower --learning_rate or fewer --epochs%s",
            "is above that before the first step"
            if worse
            else "has not fallen for two evaluations",
            "; best/ holds the best so far" if run.has_gained() else "",
        )


def keep_best(run: Run) -> None:
    """best/, where the model as it stands is the best so far."""
    state = run.progress
    if run.runtime.rank == 0 and state.best_loss is not None and state.best_step == state.step:
        attempt(f"{run.output_dir / 'best'}", write_model, run, "best")


def show_samples(run: Run) -> None:
    """Answers held-out prompts: logs a few, and scores --eval_answers of them."""
    args, tokenizer, step = run.args, run.tokenizer, run.progress.step
    if run.runtime.rank != 0 or step == 0:
        return
    count = max(args.num_samples, args.eval_answers)
    prompts, references = held_out_prompts(run.eval_rows, count, tokenizer)
    answers = generate_answers(prompts, run.model, tokenizer, args, run.runtime)
    for ids, (answer, _) in zip(prompts[: args.num_samples], answers, strict=False):
        asked = as_typed(ids, run.model, tokenizer, args.text_format)
        asked = f"--prompt {shlex.quote(asked)}" if asked else repr(tokenizer.decode(ids))
        logger.info("Sample: %s -> %r", asked, textwrap.shorten(answer, 160, placeholder=" ..."))
    if args.eval_answers and prompts:
        scored = slice(args.eval_answers)
        run.scores = score_answers(answers[scored], references[scored], tokenizer)
        write_metrics(run, {"step": step, "epoch": run.epoch_of(step), **run.scores})
        table.info("%s | %s", run.place(step), scores_line(run.scores))


# ---- a run, from flags that are in range to final/ ----------------------------------------------


class Stopped(Exception):
    """A signal, the argument, asked for the end; a checkpoint is written."""


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
    seconds: float = 0.0  # of training, without evaluations
    peak_memory_gb: float = 0.0


@dataclass
class Run:
    """The parts of one training run, as `prepare` makes them."""

    args: Args
    runtime: Runtime
    tokenizer: PreTrainedTokenizerBase
    train_rows: AlpacaDataset
    eval_rows: AlpacaDataset
    dataset_hash: str  # of the training rows
    held_out_hash: str
    model: GPT2LMHeadModel
    counts: tuple[int, int]  # parameters, those that train
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    loader: DataLoader
    eval_loader: DataLoader | None
    total_steps: int
    progress: Progress = field(default_factory=Progress)
    resumed_from: int | None = None
    signal: int | None = None  # what asked this process to stop
    signal_time: float = 0.0  # seconds, of time.monotonic
    stopping: bool = False  # what all processes agreed on after a step
    trackers: dict[str, Callable] = field(default_factory=dict)  # see start_tracker
    tracker_runs: dict[str, str] = field(default_factory=dict)  # their names for this run
    reported_step: int = -1  # the last one that an earlier start of this run has reported
    scores: dict[str, float] = field(default_factory=dict)  # of the latest --eval_answers

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.batch_sampler.steps

    def epoch_of(self, step: int) -> int:
        return max(0, step - 1) // self.steps_per_epoch

    def place(self, step: int) -> str:
        """A step of the run as the log names it: by its epoch, and the step of this epoch."""
        steps, epoch = self.steps_per_epoch, self.epoch_of(step)
        return f"Epoch {epoch} | Step {step - epoch * steps:{max(4, len(str(steps)))}}/{steps}"

    def has_gained(self) -> bool:
        """Whether an evaluation was better than that before the first step."""
        best, first = self.progress.best_loss, self.progress.first_loss
        return best is not None and (first is None or best < first)

    def told_to_stop(self) -> bool:
        """A single process at any moment; several after a step, when all have heard of it."""
        return self.stopping or (self.runtime.world_size == 1 and self.signal is not None)

    def stop_evaluating(self) -> bool:
        """Asked before each batch of an evaluation, of which all processes have as many."""
        if self.runtime.world_size > 1:
            self.stopping = self.runtime.sum_over_ranks(self.signal is not None)[0] > 0
        return self.told_to_stop()


def train_model(args: Args, runtime: Runtime) -> None:
    """One training run, from flags that are in range to final/.

    Raises ValueError or OSError for bad input, with nothing written; RuntimeError for a failure
    later on; Stopped.
    """
    started = time.perf_counter()
    with ExitStack() as closing:
        if Path(args.output_dir).exists():  # nobody else may change what is read there
            claim_directory(args, runtime, closing)
        if runtime.world_size > 1:
            dist.barrier()
        run = prepare(args, runtime)
        at_hand = (args, runtime, run.model, run.tokenizer)
        if finished(run):
            logger.info("The run in %s is finished; nothing to do", run.output_dir)
            write_extras(run)
            answer_prompts(*at_hand)
            return
        claim_directory(args, runtime, closing)
        try:
            start_records(run, closing)
            if args.from_scratch:
                save_scratch_base(run)
            signals = closing.enter_context(ExitStack())
            catch_signals(run, signals)
            if run.resumed_from is not None:  # a kill may have come between checkpoint and best/
                keep_best(run)
            with attention_without_mask(run.model):
                train(run)
            finish(run, started)
            signals.close()  # all is written: a signal ends the answers at once
            answer_prompts(*at_hand)
        except Stopped as stopped:
            name, step = signal.Signals(*stopped.args).name, run.progress.step
            again = shlex.join(["--resume_from", "auto", "--output_dir", args.output_dir])
            hint = "" if args.demo else f"; to go on: python train_llm.py {again}"
            logger.info("Stopped by %s at step %d%s", name, step, hint)
            raise
        except (ValueError, OSError, SafetensorError) as error:  # not the input's fault any more
            if isinstance(error, ConnectionError):  # of a dead worker: PyTorch's signal names it
                time.sleep(1)
            raise RuntimeError(error) from error


def prepare(args: Args, runtime: Runtime) -> Run:
    """Everything that can be found wrong before the first step, in memory: nothing is written.

    Raises ValueError.
    """
    if not (args.adapter_path or args.from_scratch):
        modify_llm.locate(args.model_name_or_path)  # out of reach: told before rows are read
    tokenizer = tokenizer_for(args)
    train_rows, eval_rows = load_rows(args, tokenizer)
    logger.info("🔧 Using device: %s", runtime.device)
    model, counts = make_model(args, runtime, tokenizer)
    loaders = (args, runtime, tokenizer)
    steps = args.gradient_accumulation_steps
    loader = make_loader(train_rows, *loaders, accumulation_steps=steps)
    run = Run(
        args, runtime, tokenizer, train_rows, eval_rows, model=model, counts=counts,
        dataset_hash=train_rows.content_hash(), held_out_hash=eval_rows.content_hash(),
        trainable={name: p for name, p in model.named_parameters() if p.requires_grad},
        optimizer=make_optimizer(model, args),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.fp16),
        loader=loader,
        eval_loader=make_loader(eval_rows, *loaders, shuffle=False) if len(eval_rows) else None,
        total_steps=args.max_steps or args.epochs * loader.batch_sampler.steps,
    )  # fmt: skip
    logger.info("🔢 Training batches: %s", f"{run.steps_per_epoch:,}")
    check_prompts(args, model, tokenizer)
    torch.manual_seed(args.seed + runtime.rank)
    if args.resume_from:
        resume(run)
    set_warmup(run)
    if args.adapter_path and run.resumed_from is None:
        loses = (
            "--learning_rate %g at first loses part of what %s has learned; a lower one keeps more"
        )
        logger.info(loses, args.learning_rate, args.adapter_path)
    check_processes_agree(run)
    table.info(summary(run))
    return run


def tokenizer_for(args: Args) -> PreTrainedTokenizerBase:
    """The tokenizer of the flags, else the model's own; random weights have GPT-2's."""
    if args.tokenizer_name_or_path:
        return load_tokenizer(args.tokenizer_name_or_path)
    base = None if args.from_scratch else args.model_name_or_path
    if args.adapter_path and not base:
        base = trained_settings(Path(args.adapter_path)).get("base_model_name_or_path")
    return model_tokenizer(base, args.adapter_path)


def load_rows(
    args: Args, tokenizer: PreTrainedTokenizerBase
) -> tuple[AlpacaDataset, AlpacaDataset]:
    """(training rows, held-out rows); rows with nothing to learn are left out and counted."""
    own_split = args.eval_dataset_path or args.dataset_test_split
    if own_split:
        held_out = labelled_rows("eval_dataset_path", args, tokenizer)
        train = held_out if args.eval_only else labelled_rows("dataset_path", args, tokenizer)
    else:
        rows = labelled_rows("dataset_path", args, tokenizer)
        train, held_out = rows.split(args.eval_fraction, args.split_seed)
    if not len(held_out if args.eval_only else train):
        purpose = "evaluate" if args.eval_only else "train"
        raise ValueError(f"--eval_fraction {args.eval_fraction}: leaves no row to {purpose} on")
    limit = args.max_eval_samples
    if args.max_samples and not (limit or own_split):  # the same share of fewer rows
        share = args.eval_fraction / (1 - args.eval_fraction)
        limit = max(1, round(args.max_samples * share))
    if args.early_stopping_patience and not len(held_out):
        raise ValueError(
            f"--early_stopping_patience: needs held-out rows, --eval_fraction {args.eval_fraction} "
            "leaves none"
        )
    train, held_out = train.first(args.max_samples), held_out.first(limit)
    if 0 < (tokens := int(held_out.label_counts.sum())) < FEW_TOKENS:
        logger.warning("%d tokens are held out: a perplexity of so few says little", tokens)
    if args.eval_answers > len(held_out):
        logger.warning("--eval_answers %d: %d rows are held out", args.eval_answers, len(held_out))
    trained = train
    if args.eval_only:
        trained = trained_rows(args, tokenizer) if args.adapter_path and args.dataset_path else None
    if trained and (shared := data_pipeline.rows_in_common(held_out, trained)):
        logger.warning("%d of %d held-out rows are also trained on", shared, len(held_out))
    return train, held_out


def labelled_rows(flag: str, args: Args, tokenizer: PreTrainedTokenizerBase) -> AlpacaDataset:
    """The rows of a dataset that hold something to learn. Raises ValueError where none does."""
    reading = {name: getattr(args, name) for name in data_pipeline.READING_FLAGS}
    path = getattr(args, flag) or args.dataset_path
    dataset = load_dataset(path, tokenizer, flag=flag, **reading)
    keep = dataset.label_counts > 0
    if not keep.any():
        raise ValueError(f"--{flag} {path}: no row is left to learn from")
    if not keep.all():
        logger.info("%d rows with nothing to learn are left out of %s", (~keep).sum(), path)
    return dataset.select(keep)


def trained_rows(args: Args, tokenizer: PreTrainedTokenizerBase) -> AlpacaDataset | None:
    """Those of --dataset_path that --adapter_path was trained on, where its hash says so."""
    saved = trained_settings(Path(args.adapter_path))
    rows = labelled_rows("dataset_path", args, tokenizer)
    split, _ = rows.split(saved.get("eval_fraction", 0), saved.get("split_seed", 0))
    for candidate in (split, rows):
        trained = candidate.first(saved.get("max_samples", 0))
        if trained.content_hash() == saved.get("dataset_sha256"):
            return trained
    return None


FEW_TOKENS = 1000  # held out: a perplexity of fewer says little


def make_loader(
    rows: AlpacaDataset, args: Args, runtime: Runtime, tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> DataLoader:  # fmt: skip
    """This process's micro-batches, each of rows of about one length."""
    return final_dataset_loader(
        rows, tokenizer=tokenizer, padding="longest", group_by_length=True, seed=args.seed,
        max_length=args.max_length, batch_size=args.batch_size, num_workers=args.num_workers,
        rank=runtime.rank, world_size=runtime.world_size, **options,
    )  # fmt: skip


def make_model(
    args: Args, runtime: Runtime, tokenizer: PreTrainedTokenizerBase
) -> tuple[GPT2LMHeadModel, tuple[int, int]]:
    """(the model as it trains, on the device; its parameters and those that train)"""
    model = build_model(args)
    check_fits(model, tokenizer, args.max_length)
    modify_llm.set_end_token(model, tokenizer.eos_token_id)
    total, trainable = counts = modify_llm.parameter_counts(model)
    shown = f"   Total: {total:,}\n   Trainable: {trainable:,} ({trainable / total:.2%})"
    logger.info("📊 Model Parameters:\n%s", shown)
    if modify_llm.is_plain(model.modification["modification_type"]):  # all of it is saved
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        model.exact_weights = {name: p.detach().clone() for name, p in frozen.items()}
    prepare_model(model, args, runtime)
    if args.compile:
        for block in model.transformer.h:
            block.compile(dynamic=True)
    return model, counts


def build_model(args: Args) -> GPT2LMHeadModel:
    """The model to train: the base with the technique, or what --adapter_path holds."""
    torch.manual_seed(args.seed)
    base = Path(args.output_dir, "base")
    if args.adapter_path:
        model = load_trained(args.adapter_path, args.model_name_or_path, dropout=args.dropout)
    elif args.from_scratch and args.resume_from and checkpoints(base.parent) and base.is_dir():
        model = final_modify(args, from_scratch=False, model_name_or_path=str(base))
    else:
        model = final_modify(args)
    rows = ("text_format", "max_length", "max_samples", "split_seed", "eval_fraction")
    model.modification |= {name: getattr(args, name) for name in rows}
    return model


def prefix_length(model: GPT2LMHeadModel) -> int:
    """How many of the model's positions virtual tokens take."""
    return len(model.transformer.prefix.embedding) if hasattr(model.transformer, "prefix") else 0


def check_fits(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Raises ValueError unless texts of `length` tokens, prefix and vocabulary fit the model."""
    config, virtual = model.config, prefix_length(model)
    if length + virtual > config.n_positions:
        prefix = f" with a prefix of {virtual}" if virtual else ""
        raise ValueError(
            f"--max_length {length}{prefix}: the model has {config.n_positions} positions"
        )
    if (ids := 1 + max(tokenizer.get_vocab().values())) > config.vocab_size:
        raise ValueError(
            f"--tokenizer_name_or_path: {ids} token ids, the model has embeddings for "
            f"{config.vocab_size}"
        )


def prepare_model(model: GPT2LMHeadModel, args: Args, runtime: Runtime) -> None:
    """To the device: what is frozen in the runtime's precision, to which autocast would bring it;
    all that trains, and LayerNorms, in fp32."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            rounded = not (parameter.requires_grad or isinstance(module, nn.LayerNorm))
            dtype = runtime.dtype if rounded else torch.float32
            # Weights lie in the mapped file of the base: where some leave it, all do, or the whole
            # file would stay in memory.
            copied = runtime.dtype != torch.float32
            parameter.data = parameter.data.to(runtime.device, dtype, copy=copied)
    model.to(runtime.device)
    for block in model.transformer.h:
        if model.config.activation_function == "gelu_new":  # the same function, in one kernel
            block.mlp.act = nn.GELU(approximate="tanh")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()


def summary(run: Run) -> str:
    """What is about to happen, in a few lines."""
    args, runtime, rows, model = run.args, run.runtime, run.train_rows, run.model
    (total, trainable), technique = run.counts, model.modification["modification_type"]
    dtype = str(runtime.dtype).removeprefix("torch.")
    memory = ""
    if runtime.device.type == "cuda":
        free, on_card = torch.cuda.mem_get_info()
        memory = f"\n   Memory:  {free / 1e9:.1f} of the card's {on_card / 1e9:.1f} GB are free"
    return f"""\
   Device:  {runtime.device}, {dtype}, processes: {runtime.world_size}
   Model:   {model.base_name or "random weights"}, {technique}: {trainable / total:.2%} trains
   Rows:    {len(rows):,} to train on, {len(run.eval_rows):,} held out
   Tokens:  {rows.lengths.sum():,} an epoch, {rows.label_counts.sum():,} with a label
   Steps:   {run.total_steps:,} of {args.batch_size} x {args.gradient_accumulation_steps} x \
{runtime.world_size} rows; {args.scheduler} from {args.learning_rate:g}, warm-up \
{args.warmup_steps:,}{memory}"""


# Each asks for a checkpoint and the end; terminals, `timeout`, SLURM and torchrun send them.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)  # Windows has but two
]


def catch_signals(run: Run, closing: ExitStack) -> None:
    """Until `closing` closes, a signal only leaves a note for the training loop."""
    pause = 5.0 if run.runtime.world_size > 1 else 0.1  # seconds

    def stop(number: int, _frame: object) -> None:
        if not run.signal:
            run.signal, run.signal_time = number, time.monotonic()
        # Asked twice. Not by SIGTERM after SLURM's warning, nor by `timeout` or torchrun, which
        # send their signal to the process and to its whole group.
        elif number in (run.signal, signal.SIGINT) and time.monotonic() > run.signal_time + pause:
            if __name__ == "__main__":
                os._exit(128 + number)  # the last checkpoint is whole
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup and a shell's `&` leave it
            before = signal.signal(signum, stop) or signal.SIG_DFL
            closing.callback(signal.signal, signum, before)


def finish(run: Run, started: float) -> None:
    """final/, then the curves, the predictions and the closing words. Raises Stopped."""
    args, state, output_dir = run.args, run.progress, run.output_dir
    if run.runtime.rank != 0:
        return
    write_model(run, "final")
    write_extras(run)
    if state.best_loss is not None:
        before = f"{perplexity(state.first_loss):.2f} before, " if state.first_loss else ""
        after, best = perplexity(state.last_loss), perplexity(state.best_loss)
        words = "Held-out perplexity: %s%.2f after %d steps, best %.2f at step %d"
        table.info(words, before, after, state.step, best, state.best_step)
        if not run.has_gained():
            table.info("No evaluation was better than that before the first step: best/ is worse")
    if run.scores:
        table.info(scores_line(run.scores))
    table.info("Time: %d min %02d s", *divmod(round(time.perf_counter() - started), 60))
    if args.demo and args.from_scratch:  # the first part's directory is a temporary one
        return
    use, fields = output_dir / "best", prompt_columns(args.text_format)
    if step_of(use) != state.best_step:
        use = output_dir / "final"
    prompt = '"..."'
    if len(fields) > 1:
        prompt = shlex.quote(json.dumps(dict.fromkeys(fields, "...")))
    words = "Written to %s. Try it: python train_llm.py --adapter_path %s --prompt %s"
    table.info(words, output_dir, shlex.quote(str(use)), prompt)


# ---- what a run writes ---------------------------------------------------------------------------


STAGED = re.compile(r"\.(?P<state>new|old)_(?P<name>best|final|base)(_[0-9a-f]{8})?")
STEP, LOG = re.compile(r"step_\d+"), re.compile(r"training_\d{8}_\d{6}\.log")
# What a file system says that has no locks, or cannot sync a directory
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
CARD = "README.md"  # not under the checksums: whoever publishes a model edits it


def claim_directory(args: Args, runtime: Runtime, closing: ExitStack) -> None:
    """Makes and locks the output directory until `closing` closes, and puts right what a crash
    left there. Raises ValueError for one that is not to be had."""
    if runtime.rank != 0:
        return
    output_dir = Path(args.output_dir)
    refuse_used_directory(args)
    # A singleton: this process may take it more than once.
    lock = filelock.FileLock(output_dir / ".lock", is_singleton=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=10)  # a killed run's DataLoader workers hold it for seconds
        closing.callback(lock.release)
    except filelock.Timeout:
        raise ValueError(
            f"--output_dir {output_dir}: another run writes there; if none is (a run killed on "
            f"another host), remove {lock.lock_file}"
        ) from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in UNSUPPORTED:
            reason = getattr(error, "strerror", error)
            raise ValueError(f"--output_dir {output_dir}: cannot be written to: {reason}") from None
        logger.warning("--output_dir %s: no locks there: see that no second run does", output_dir)
    refuse_used_directory(args)  # another run may have come and gone meanwhile
    unfinished = [f"{name}.new" for name in ("run.json", "metrics.jsonl", "predictions.jsonl")]
    for path in output_dir.glob("checkpoints/.new_step_*"):
        remove(path)
    for name in unfinished:
        (output_dir / name).unlink(missing_ok=True)
    recover_directories(output_dir)


def refuse_used_directory(args: Args) -> None:
    """A run is never written over by accident, nor continued in the directory of another one; only
    what a run wrote is ever removed, and nothing that this one needs. Raises ValueError."""
    output_dir, overwrite = Path(args.output_dir), args.overwrite_output_dir
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir}: is a file")
    if args.resume_from and resumed_run(args)[0].resolve() == output_dir.resolve():
        return
    used = [path for name in outputs(args) if os.path.lexists(path := output_dir / name)]
    if used and not overwrite:
        raise ValueError(
            f"--output_dir {output_dir}: holds a run, {used[0].name}; --resume_from auto, or "
            "--overwrite_output_dir"
        )
    written = written_by_a_run(output_dir) if overwrite else []
    if foreign := [path for path in used if path not in written]:
        raise ValueError(
            f"--overwrite_output_dir: {foreign[0]}: no run.json beside it says that a run wrote "
            "it; remove or move it yourself"
        )
    for needed in filter(None, (getattr(args, name) for name in PATH_FLAGS)):
        if any(Path(needed).resolve().is_relative_to(path.resolve()) for path in written):
            raise ValueError(f"--overwrite_output_dir: would remove {needed}, which this run needs")


def outputs(args: Args) -> list[str]:
    """The names of all that a run with these flags writes into its directory, but its logs."""
    names = ["checkpoints", "best", "final", "metrics.jsonl", *EXTRAS, "run.json"]
    names += ["base"] if args.from_scratch else []
    return [name for name in args.report_to if name == "tensorboard"] + names


def written_by_a_run(output_dir: Path) -> list[Path]:
    """What is there of the things that a run wrote into a directory, as its run.json says."""
    known = outputs(Args(from_scratch=True, report_to=["tensorboard"]))
    with suppress(ValueError, TypeError):
        names = modify_llm.read_json(output_dir / "run.json").get("written", [])
        # A file may not choose what is removed.
        names = [name for name in names if name in known or LOG.fullmatch(name)]
        return [path for name in names if os.path.lexists(path := output_dir / name)]
    return []


def clear_directory(output_dir: Path) -> None:
    """Removes what a run wrote, and nothing else: of a link the link alone."""
    written = written_by_a_run(output_dir)
    for path in sorted(written, key=lambda path: path.name == "run.json"):  # it says so, so last
        remove(path)
    if written:
        names = ", ".join(path.name for path in written)
        logger.info("--overwrite_output_dir: removed from %s: %s", output_dir, names)


def remove(path: Path) -> None:
    """Of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def whole_directory(output_dir: Path, name: str) -> Iterator[Path]:
    """A directory to fill; only when it is whole, with sha256 sums, and synced, does it become
    output_dir/name. It is filled beside what it replaces, so on the same disk."""
    path, unique = output_dir / name, uuid.uuid4().hex[:8]
    new, old = (output_dir / f".{state}_{name}_{unique}" for state in ("new", "old"))
    try:
        new.mkdir()
        yield new
        modify_llm.write_manifest(new, leave_out=CARD)
        for item in [*new.rglob("*"), new]:
            sync(item)
        if path.exists():
            shutil.move(path, old)  # a copy, where a container's image holds it
        new.rename(path)
        sync(output_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
    shutil.rmtree(old, ignore_errors=True)  # on NFS a file that is still read stays for a while


def recover_directories(output_dir: Path) -> None:
    """After a crash: puts back what was moved away for a replacement that never came, removes what
    was half-written."""
    for path in output_dir.glob(".*"):
        if staged := STAGED.fullmatch(path.name):
            replaced = path.with_name(staged["name"])
            if staged["state"] == "old" and not is_whole(replaced) and is_whole(path):
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            shutil.rmtree(path, ignore_errors=True)


def is_whole(directory: Path) -> bool:
    """Whether all that a run wrote into a directory is there, by its checksums."""
    try:
        modify_llm.verify_directory(directory)
    except (ValueError, OSError):
        return False
    return True


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk, where its file system can."""
    if path.is_dir() and os.name == "nt":  # Windows cannot sync a directory
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning("%s: not synced, its file system cannot: %s", path, error.strerror)
    finally:
        os.close(descriptor)


def write_at_once(path: Path, text: str) -> None:
    """Replaces a file as a whole: on a full disk, or after a kill, the one before stays."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def attempt(what: str, work: Callable[..., object], *args: object) -> bool:
    """Does what a run can do without: where it fails, a warning says so and the run goes on."""
    try:
        work(*args)
        return True
    except Exception as error:
        logger.warning("%s: %s; the run goes on without", what, modify_llm.first_line(error))
        return False


def start_tracker(run: Run, name: str, closing: ExitStack) -> None:
    """Adds a function to run.trackers that takes numbers by name, and their step. A run that is
    resumed goes on in the tracker's same run; one that fails says so there."""
    settings = {key: str(value) for key, value in public_settings(run.args).items()}
    reported = run.reported_step  # by an earlier start: steps never go back
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run.output_dir / name, purge_step=run.progress.step + 1)
        closing.callback(attempt, name, writer.close)
        writer.add_text("settings", f"```\n{yaml.safe_dump(settings)}```")

        def log(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

    else:
        tracker = importlib.import_module(name)  # trackio is called as wandb is
        run_id = run.tracker_runs.setdefault(name, uuid.uuid4().hex[:8])
        project = os.environ.get(f"{name.upper()}_PROJECT", "train_llm")
        same_run = {"id" if name == "wandb" else "name": run_id, "resume": "allow"}
        tracker.init(project=project, config=settings, **same_run)

        def end(kind: type | None, *_: object) -> None:
            failed = {"exit_code": int(kind not in (None, Stopped))} if name == "wandb" else {}
            attempt(name, partial(tracker.finish, **failed))

        def log(values: dict[str, float], step: int) -> None:
            if step > reported:
                tracker.log(values, step=step)

        closing.push(end)
    run.trackers[name] = log


def report(run: Run, values: dict[str, float], step: int) -> None:
    """To all trackers; one that fails is left out from there on."""
    for name, log in list(run.trackers.items()):
        if not attempt(f"--report_to {name}", log, values, step):
            del run.trackers[name]


def public_settings(args: Args) -> dict[str, Any]:
    """The settings as they are written down: of a URL neither user, password nor query, which may
    be secrets."""
    settings = dict(vars(args))
    for name in PATH_FLAGS:
        parts = urlsplit(str(settings[name]))
        if parts.netloc:
            settings[name] = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return settings


def start_records(run: Run, closing: ExitStack) -> None:
    """Clears what --overwrite_output_dir says to clear; then run.json, metrics.jsonl and the log
    file begin."""
    args, output_dir, state = run.args, run.output_dir, run.progress
    if run.runtime.rank != 0:
        return
    if args.overwrite_output_dir:
        clear_directory(output_dir)
    for name in EXTRAS:  # an earlier end's, of a run that goes on
        (output_dir / name).unlink(missing_ok=True)
    for path in checkpoints(output_dir):
        if step_number(path) > state.step:  # of the way that is left
            logger.info("%s is removed: the run goes on from step %d", path, state.step)
            remove(path)
    run.reported_step = cut_metrics(output_dir / "metrics.jsonl", state)
    log = output_dir / f"training_{datetime.now():%Y%m%d_%H%M%S}.log"
    open_log_file(log, closing)
    for name in args.report_to:
        attempt(f"--report_to {name}", start_tracker, run, name, closing)
    written = [log.name, *(path.name for path in written_by_a_run(output_dir)), *outputs(args)]
    written += ["base"] if args.demo else []
    write_at_once(output_dir / "run.json", json.dumps({
        "settings": public_settings(args),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "python": sys.version,
        "dataset_sha256": run.dataset_hash,
        "held_out_sha256": run.held_out_hash,
        "parameters": dict(zip(("total", "trainable"), run.counts, strict=True)),
        "circumstances": circumstances(run) | {"device": str(run.runtime.device)},
        "trackers": run.tracker_runs,
        "written": [*dict.fromkeys(written)],
    }, indent=2))  # fmt: skip


def cut_metrics(path: Path, progress: Progress) -> int:
    """Drops the rows that a run at `progress` writes again: after its step, and an evaluation
    still due. Returns the last step that had been there; -1: none."""
    rows, last_step = [], -1
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            last_step = max(last_step, row["step"])
            due = progress.evaluation_due and "eval_loss" in row
            if row["step"] < progress.step + (not due):
                rows.append(json.dumps(row) + "\n")
        except (ValueError, KeyError, TypeError):  # such as the half-written last line of a kill
            logger.warning("%s: a damaged line is left out: %.60r", path, line)
    write_at_once(path, "".join(rows))
    return last_step


def write_metrics(run: Run, row: dict[str, Any]) -> None:
    """Appends a row to metrics.jsonl, and reports it."""
    if run.runtime.rank != 0:
        return
    finite = {name: value for name, value in row.items() if math.isfinite(value)}
    # JSON has no Infinity: the norm of an fp16 step that was left out is null.
    line = json.dumps(dict.fromkeys(row) | finite) + "\n"
    with open(run.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(line)
    step = finite.pop("step")
    report(run, finite, step)


def save_scratch_base(run: Run) -> None:
    """Writes the random base that the run starts from (the seed makes it again) to base/, to load
    the result on."""
    if run.runtime.rank == 0 and not run.model.base_path:  # else it was loaded from there
        with torch.random.fork_rng():
            torch.manual_seed(run.args.seed)
            base = GPT2LMHeadModel(modify_llm.read_config(run.args))
        with whole_directory(run.output_dir, "base") as directory:
            base.save_pretrained(directory)
    run.model.base_path = run.model.base_name = str(run.output_dir / "base")


def write_model(run: Run, name: str) -> None:
    """best/ or final/."""
    run.model.modification["step"] = run.progress.step
    run.model.modification["dataset_sha256"] = run.dataset_hash
    with whole_directory(run.output_dir, name) as directory:
        save_trained(run.model, directory)
        data_pipeline.save_tokenizer(run.tokenizer, directory, run.args.text_format)
        write_card = (directory / CARD).write_text
        attempt("the model card", lambda: write_card(model_card(run), "utf-8"))


def step_of(directory: Path) -> int | None:
    """The step of the model in best/ or final/, None where there is none."""
    return data_pipeline.read_settings(directory / modify_llm.METADATA).get("step")


def model_card(run: Run) -> str:
    """README.md for best/ and final/: base, technique, data, settings, results, how to load."""
    args, state, base = run.args, run.progress, run.model.base_name or "base"
    (total, trainable), technique = run.counts, run.model.modification["modification_type"]
    name = f"{Path(base).name} (a local model)" if Path(base).exists() else base
    load = 'model = AutoModelForCausalLM.from_pretrained("DIR")  # transformers\n'
    library = "transformers" if modify_llm.is_plain(technique) else "peft"
    if library == "peft":
        load = load.replace("DIR", "BASE" if name != base else base)
        load += 'model = PeftModel.from_pretrained(model, "DIR")  # peft\n'
    if TECHNIQUES[technique].layout == "state":  # a format of ours alone
        load = library = ""
    chosen = vars(args) | run.model.modification
    settings = [*OPTIMISATION_FLAGS, "batch_size", "max_length", *TECHNIQUES[technique].flags]
    losses = [loss for loss in (state.first_loss, state.last_loss) if loss is not None]
    results = " -> ".join(f"{perplexity(loss):.2f}" for loss in losses) or "not evaluated"
    rows = "\n".join(f"| {setting} | {chosen[setting]} |" for setting in settings)
    dataset = Path(urlsplit(args.dataset_path).path).name
    return f"""{modify_llm.card_metadata(base, library)}# {technique} on {name}

- Trained: {trainable:,} of {total:,} parameters ({trainable / total:.2%}), {state.step:,} steps
- Data: {len(run.train_rows):,} rows of {dataset}, format {args.text_format!r}
- Held-out perplexity, {len(run.eval_rows):,} rows: {results}
{(run.scores and scores_line(run.scores)) or ""}
A prompt, with its fields in braces:

```
{prompt_templates(args.text_format)[-1]}
```

| setting | value |
| --- | --- |
{rows}

```python
{load}model = modify_llm.load_trained("DIR")  # with modify_llm.py, all techniques
```

In the terminal: `python train_llm.py --adapter_path DIR --prompt "..."`
"""


def write_predictions(run: Run) -> None:
    """predictions.jsonl: the reference, the untouched base's answer and the tuned model's."""
    tokenizer, count, model = run.tokenizer, run.args.num_samples, run.model
    prompts, references = held_out_prompts(run.eval_rows, count, tokenizer)
    if not prompts:
        return
    try:
        base = modify_llm.detach(modify_llm.share_weights(model))
    except ValueError:  # where it was trained itself
        chosen = Args(from_scratch=False, model_name_or_path=model.base_name, dropout=0.0)
        base = modify_llm.load_base(chosen).requires_grad_(False)
        prepare_model(base, run.args, run.runtime)
    settings = (tokenizer, run.args, run.runtime)
    answers = [generate_answers(prompts, answering, *settings) for answering in (base, model)]
    write_at_once(run.output_dir / "predictions.jsonl", as_lines([
        {"prompt": tokenizer.decode(prompt), "reference": tokenizer.decode(reference),
         "base": untuned, "tuned": tuned, "stopped": stopped}
        for prompt, reference, (untuned, _), (tuned, stopped) in zip(
            prompts, references, *answers, strict=True
        )
    ]))  # fmt: skip


def as_lines(rows: list[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def plot_curves(run: Run) -> None:
    """training_curves.png: loss, perplexity, learning rate and gradient norm over the steps."""
    from matplotlib.figure import Figure

    rows = pd.read_json(run.output_dir / "metrics.jsonl", lines=True).set_index("step")
    titles = {"loss": "loss per token", "perplexity": "perplexity"}
    titles |= {"lr": "learning rate", "grad_norm": "gradient norm"}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        curves = rows.reindex(columns=[key, f"eval_{key}"])
        raw, held_out = (curves[name].dropna() for name in curves)
        points = 1 if key == "lr" else max(1, len(raw) // 10)  # the rate is exact, not noisy
        axes.plot(raw, ".-", color="#4c72b0", alpha=0.3)
        smooth = raw.rolling(points, min_periods=1).mean()
        axes.plot(smooth, color="#4c72b0", label="training, smoothed")
        if len(held_out):
            axes.plot(held_out, "o-", color="#c44e52", label="held out")
            axes.legend()
        axes.set(xlabel="optimizer step", ylabel=title)
        axes.set_yscale("log" if key == "perplexity" else "linear")
        axes.grid(alpha=0.3)
    figure.savefig(run.output_dir / "training_curves.png", dpi=110)


# Written once final/ is; what a run can do without.
EXTRAS = {"training_curves.png": plot_curves, "predictions.jsonl": write_predictions}


def write_extras(run: Run) -> None:
    """The curves and the predictions that are not there yet. Raises Stopped after a signal."""
    for name, write in EXTRAS.items():
        if run.signal:
            raise Stopped(run.signal)
        if run.runtime.rank == 0 and not (run.output_dir / name).exists():
            attempt(name, write, run)


# ---- checkpoints and resuming --------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # the parts of AdamW's state, by PyTorch's names
GENERATORS = {"cpu": torch.random, "cuda": torch.cuda, "mps": torch.mps}


def save_checkpoint(run: Run) -> None:
    """checkpoints/step_N, one safetensors file: trainable weights, optimizer and random states; in
    its metadata the progress, and a sum over all. What rotates out is removed."""
    runtime, step, tensors = run.runtime, run.progress.step, {}
    random = {kind: GENERATORS[kind].get_rng_state() for kind in {"cpu", runtime.device.type}}
    for rank, states in enumerate(gather(random, runtime)):
        tensors |= {f"random.{rank}.{kind}": state for kind, state in states.items()}
    if runtime.rank != 0:
        return
    for name, parameter in run.trainable.items():
        parts = {"weight": parameter, **run.optimizer.state[parameter]}
        tensors |= {f"{part}.{name}": tensor for part, tensor in parts.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    state = json.dumps({
        "progress": asdict(run.progress), "settings": public_settings(run.args),
        "facts": facts(run), "circumstances": circumstances(run),
        "grad_scaler": run.scaler.state_dict(), "trackers": run.tracker_runs,
    })  # fmt: skip
    path = run.output_dir / "checkpoints" / f"step_{step:08d}"
    new = path.with_name(f".new_{path.name}")
    path.parent.mkdir(exist_ok=True)
    try:
        save_file(tensors, new, {"state": state, "sha256": checksum(state, tensors)})
        sync(new)
        new.replace(path)
        sync(path.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    others = [path for path in checkpoints(run.output_dir) if step_number(path) != step]
    for path in others[run.args.save_total_limit - 1 :]:
        if step_number(path) not in (run.progress.best_step, run.resumed_from):
            attempt(f"{path} cannot be removed", remove, path)


def checksum(state: str, tensors: dict[str, Tensor]) -> str:
    """sha256 of all that a checkpoint holds: a flipped bit would load without a word."""
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def gather(value: Any, runtime: Runtime) -> list[Any]:
    """What each process holds, by rank."""
    gathered = [value] * runtime.world_size
    if runtime.world_size > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def step_number(path: Path) -> int:
    """Of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def checkpoints(output_dir: Path) -> list[Path]:
    """checkpoints/step_*, newest first."""
    found = [path for path in output_dir.glob("checkpoints/step_*") if STEP.fullmatch(path.name)]
    return sorted(found, key=step_number, reverse=True)


def read_checkpoint(path: Path, whole: bool = True) -> dict[str, Any]:
    """Everything in a checkpoint, verified by its sum; nothing is unpickled. Not the whole: only
    its state, unverified. Raises ValueError."""
    try:
        tensors = modify_llm.read_tensors(path) if whole else {}
        with safe_open(path, "pt") as file:
            text, expected = (file.metadata()[name] for name in ("state", "sha256"))
        if whole and expected != checksum(text, tensors):
            raise ValueError("is damaged (its checksum differs)")
        state = json.loads(text)
        progress = Progress(**state["progress"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = modify_llm.first_line(error).removeprefix(f"{path}: ")
        raise ValueError(f"no good checkpoint: {reason}") from None
    random = {name: tensors.pop(name) for name in [*tensors] if name.startswith("random.")}
    return state | {"progress": progress, "tensors": tensors, "random": random}


def facts(run: Run) -> dict[str, Any]:
    """What a checkpoint shares with the run that goes on from it, and every process with the
    first: the same work."""
    return {f"--{name}": v for name, v in vars(run.args).items() if name not in FREE_TO_CHANGE} | {
        "rows a step (--batch_size x --gradient_accumulation_steps x processes)":
            run.loader.batch_sampler.global_size,
        "training rows (sha256)": run.dataset_hash,
        "base model (sha256)": run.model.base_fingerprint,
    }  # fmt: skip


def circumstances(run: Run) -> dict[str, Any]:
    """What a run may go on with otherwise than before, but all its processes alike."""
    return {
        "processes": run.runtime.world_size,
        "precision": str(run.runtime.dtype),
        "steps in all": run.total_steps,
        "held-out rows (sha256)": run.held_out_hash,
    }


def shapes(run: Run, step: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a checkpoint of this step."""
    kinds = ("weight", *MOMENTS) if step else ("weight",)
    return {
        f"{kind}.{name}": () if kind == "step" else tuple(parameter.shape)
        for name, parameter in run.trainable.items()
        for kind in kinds
    }


def difference(ours: dict[str, Any], theirs: dict[str, Any], whose: str = "this run's") -> str:
    """The first fact that differs, "" where all agree. A flag that one side does not know counts as
    not given."""
    for name in ours | theirs:
        default = DEFAULTS.get(name.removeprefix("--"))
        mine, other = ours.get(name, default), theirs.get(name, default)
        if mine != other and (name in ours or not name.startswith("--")):
            return f"{name} is {other}, {whose} {mine}"
    return ""


def check_processes_agree(run: Run) -> None:
    """Raises ValueError, on every process, where one is about to do other work than process 0: on
    a machine that does not see the shared directory, with another card, with other rows."""
    mine = {"step": run.progress.step, "best step": run.progress.best_step}
    mine |= facts(run) | circumstances(run) | {"final/ there": finished(run)}
    first, *others = gather(mine, run.runtime)
    for rank, other in enumerate(others, 1):
        if odd := difference(first, other, "that of process 0"):
            raise ValueError(
                f"process {rank}: {odd}; all need the same files, a shared --output_dir and the "
                "same kind of device"
            )


def resume(run: Run) -> None:
    """Continues from --resume_from: under auto from the newest good checkpoint, with a warning for
    each bad one.

    Raises ValueError for a checkpoint of another run, or a bad one that was asked for by its path.
    """
    wanted, (root, by_path) = run.args.resume_from, resumed_run(run.args)
    for path in [by_path] if by_path else checkpoints(root):
        try:
            state = read_checkpoint(path)
            if run.args.warmup_steps is None:  # a longer run keeps its warm-up
                run.args.warmup_steps = state["settings"].get("warmup_steps")
            other_run = difference(facts(run), state["facts"])
            found = {name: tuple(tensor.shape) for name, tensor in state["tensors"].items()}
            odd = difference(shapes(run, state["progress"].step), found)
            if odd and not other_run:
                raise ValueError(odd)
        except ValueError as error:
            if by_path:
                raise ValueError(f"--resume_from {path}: {error}") from None
            logger.warning("Checkpoint skipped: %s: %s", path, error)
            continue
        if (steps := state["circumstances"]["steps in all"]) > run.total_steps:
            other_run = f"was to take {steps} steps, not {run.total_steps}: a run may not shrink"
        if other_run:
            raise ValueError(
                f"--resume_from {path}: {other_run}; a new run takes another --output_dir, without "
                "--resume_from"
            )
        logger.info("Resumed from %s at step %d", path, state["progress"].step)
        restore(run, state)
        return
    if wanted != "auto":
        raise ValueError(f"--resume_from {wanted}: no good checkpoint in it")
    if (root / "final").exists() and not checkpoints(root):  # they were removed
        raise ValueError(
            f"--resume_from auto: no checkpoint in {root}, but a result: --overwrite_output_dir in "
            "its place starts over"
        )
    none = "--resume_from auto: no good checkpoint in %s, starting at step 0"
    logger.warning(none, run.output_dir)


def restore(run: Run, state: dict) -> None:
    """Puts a checkpoint's tensors, progress and random state into the run, and says what is
    another from here on."""
    run.progress = progress = state["progress"]
    run.resumed_from, run.tracker_runs = progress.step, state["trackers"]
    before, now = state["circumstances"], circumstances(run)
    changed = [name for name in now if before[name] != now[name]]
    for name in changed:
        logger.info("From here on %s: %s, not %s", name, now[name], before[name])
    other_rows = "held-out rows (sha256)" in changed
    if other_rows:
        progress.first_loss = progress.last_loss = None
        progress.evaluations_without_gain, progress.evaluation_due = 0, True
    best_is_there = progress.best_step in (progress.step, step_of(run.output_dir / "best"))
    if progress.best_loss is not None and (other_rows or not best_is_there):
        logger.info("The best loss is sought anew: that of step %d is not here", progress.best_step)
        progress.best_loss, progress.best_step = None, 0
    patience = run.args.early_stopping_patience
    progress.stopped_early = 0 < patience <= progress.evaluations_without_gain
    tensors, rank = state["tensors"], run.runtime.rank
    for name, parameter in run.trainable.items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        if progress.step:
            moments = {part: tensors[f"{part}.{name}"].to(parameter.device) for part in MOMENTS}
            run.optimizer.state[parameter] = moments
    if state["grad_scaler"] and run.runtime.fp16:  # empty from a run that needed none
        run.scaler.load_state_dict(state["grad_scaler"])
    torch.manual_seed(run.args.seed + rank + 100_003 * progress.step)
    for kind in {"cpu", run.runtime.device.type}:
        if (random := state["random"].get(f"random.{rank}.{kind}")) is not None:
            GENERATORS[kind].set_rng_state(random)
        else:
            logger.info("Random states that were not there, of process %d, are seeded anew", rank)


def finished(run: Run) -> bool:
    """Whether its newest good checkpoint is at the last step, and final/ of it verifies."""
    state = run.progress
    at_end = state.step >= run.total_steps or state.stopped_early
    if run.resumed_from is None or not at_end or state.evaluation_due:
        return False
    final = run.output_dir / "final"
    return step_of(final) == state.step and is_whole(final)


# ---- answers -------------------------------------------------------------------------------------

ANSWERS_AT_ONCE = 32  # sequences; a beam each
GENERATION_FLAGS = (
    "max_new_tokens", "repetition_penalty", "num_beams", "length_penalty",
)  # fmt: skip
# What decides an answer besides
DRAWING = ("no_repeat_ngram_size", "temperature", "top_p", "seed", "text_format")


def prompt_templates(text_format: str) -> list[str]:
    """What stands before a response, as templates over a row's fields."""
    alpaca = [data_pipeline.PROMPT_WITH_INPUT, data_pipeline.PROMPT_WITHOUT_INPUT]
    named = {"output": ["{output}"], "alpaca": alpaca, "messages": alpaca[1:]}
    return named.get(text_format) or [text_format.split("||")[0]]


def prompt_columns(text_format: str) -> list[str]:
    """The columns that stand before the response."""
    columns, template = data_pipeline.format_columns(text_format), prompt_templates(text_format)[0]
    return [name for name in columns if f"{{{name}}}" in template]


def prompt_fields(prompt: Any, text_format: str, literal: bool = False) -> dict[str, Any]:
    """The fields of a row that a prompt gives: a text is the only one before the response.

    For formats with several, and for turns, it may be a dict or (unless literal) a JSON object of
    them; null is empty. Raises ValueError for a field that is missing or misspelt.
    """
    is_chat, read = text_format == "messages", prompt_columns(text_format)
    required = [name for name in read if name != "input"] or read  # an input may be empty
    known, given = data_pipeline.format_columns(text_format), prompt
    if not (literal or text_format == "output"):
        with suppress(ValueError, RecursionError, TypeError):
            given = json.loads(prompt)
    given = given if isinstance(given, dict) else {}
    data_pipeline.check_names(given, known)
    if not (isinstance(prompt, dict) or given.keys() & {*known}):
        given = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {}
        if len(required) == 1:
            given = {required[0]: prompt}
    if is_chat:
        if not (given.get("messages") or given.get("conversations")):
            raise ValueError("its fields are neither 'messages' nor 'conversations'")
        return given
    if missing := [name for name in required if name not in given]:
        raise ValueError(
            f"the format reads {read}, a JSON object of them; {missing[0]!r} is missing"
        )
    texts = {name: "" if value is None else str(value) for name, value in given.items()}
    return dict.fromkeys(known, "") | texts


def prompt_ids(
    prompt: Any, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, text_format: str
) -> list[int]:
    """The tokens of a prompt in the run's own format. Raises ValueError for one too long."""
    try:
        ids = encode_prompt(prompt_fields(prompt, text_format), text_format, tokenizer)
        if len(ids) + prefix_length(model) >= (positions := model.config.n_positions):
            raise ValueError(f"{len(ids)} tokens leave no room in {positions} positions")
    except ValueError as error:
        raise ValueError(
            f"--prompt, --prompts_file or --chat: {str(prompt)[:40]!r}...: {error}"
        ) from None
    return ids or [tokenizer.eos_token_id]


def as_typed(
    ids: list[int], model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, text_format: str
) -> str:
    """What has to be typed as --prompt to get these tokens; "" where there is no such text."""
    for template in prompt_templates(text_format):
        parts = [*string.Formatter().parse(template)]
        pattern = "".join(re.escape(text) + "(.*)" * bool(name) for text, name, *_ in parts)
        if found := re.fullmatch(pattern, tokenizer.decode(ids), re.DOTALL):
            fields = dict(zip((name for _, name, *_ in parts if name), found.groups(), strict=True))
            for typed in (*fields.values(), json.dumps(fields, ensure_ascii=False)):
                with suppress(ValueError):
                    if prompt_ids(typed, model, tokenizer, text_format) == ids:
                        return typed
    return ""


@contextmanager
def answering(model: GPT2LMHeadModel, runtime: Runtime) -> Iterator[None]:
    """Inside, the model generates, with the mask that padding on the left needs; training's random
    state is left alone."""
    training, config = model.training, model.config
    attention, pad_token_id = config._attn_implementation, config.pad_token_id
    config.pad_token_id = None  # or transformers warns of padding after an answer's end
    model.eval().set_attn_implementation("sdpa")
    gpus = [runtime.device] if runtime.device.type == "cuda" else []
    try:
        with torch.no_grad(), runtime.autocast(), torch.random.fork_rng(gpus):
            yield
    finally:
        model.train(training).set_attn_implementation(attention)
        config.pad_token_id = pad_token_id


def generate_answers(
    prompts: list[list[int]], model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase,
    args: Args, runtime: Runtime, streamer: TextStreamer | None = None, first: int = 0,
) -> list[tuple[str, bool]]:  # fmt: skip
    """(answer, whether it stopped by itself) for the ids of each prompt, in batches of about one
    length. Equal prompts draw different answers. streamer: shows the answer to a single one.
    first: the number of the first prompt among all, so that no two parts draw alike."""
    room, eos = model.config.n_positions - prefix_length(model), tokenizer.eos_token_id
    limits = [min(args.max_new_tokens, room - len(ids)) for ids in prompts]
    chosen = {name: getattr(args, name) for name in GENERATION_FLAGS}
    if args.temperature:
        chosen |= {
            "do_sample": True,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": 0,
        }
    settings = GenerationConfig(**chosen, eos_token_id=eos, pad_token_id=eos)
    answers: dict[int, tuple[str, bool]] = {}
    size = max(1, ANSWERS_AT_ONCE // args.num_beams)
    quiet = True if len(prompts) <= size else None
    bar = tqdm(total=len(prompts), desc="answering", leave=False, disable=quiet)
    left = sorted(range(len(prompts)), key=lambda i: (limits[i], len(prompts[i])))
    with bar, answering(model, runtime):
        torch.manual_seed(args.seed + first)
        while left:
            settings.max_new_tokens = limits[left[0]]
            batch = [i for i in left[:size] if limits[i] == limits[left[0]]]
            left = left[len(batch) :]
            padded = tokenizer.pad(
                {"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt"
            ).to(runtime.device)
            width = padded["input_ids"].shape[1]
            output = model.generate(
                **padded, generation_config=settings, streamer=streamer,
                logits_processor=no_repeats(args.no_repeat_ngram_size, width),
            )  # fmt: skip
            for i, answer in zip(batch, output[:, width:].tolist(), strict=True):
                stopped = eos in answer
                text = tokenizer.decode(answer[: answer.index(eos)] if stopped else answer)
                # a character may be cut in half
                answers[i] = (text if stopped else text.removesuffix("\ufffd"), stopped)
            bar.update(len(batch))
    return [answers[i] for i in range(len(prompts))]


def no_repeats(size: int, width: int) -> LogitsProcessorList:
    """--no_repeat_ngram_size, behind a prompt of `width` tokens alone: transformers' own setting
    would ban the prompt's names, too."""
    no_repeat = NoRepeatNGramLogitsProcessor(size) if size else None
    chain = [lambda ids, logits: no_repeat(ids[:, width:], logits)] if size else []
    return LogitsProcessorList(chain)


def check_prompts(args: Args, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a prompt that cannot be put."""
    for prompt in (*args.prompt, *(fields for _, fields in read_prompts(args))):
        prompt_ids(prompt, model, tokenizer, args.text_format)


def answer_prompts(
    args: Args, runtime: Runtime, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Prints the answer to each --prompt, writes those to --prompts_file, and chats."""
    if runtime.rank != 0:
        return
    check_prompts(args, model, tokenizer)
    for prompt, answer, stopped in answered(args.prompt, 0, args, runtime, model, tokenizer):
        table.info("Prompt: %s\nAnswer: %s%s", prompt, answer, "" if stopped else " [...]")
    if args.prompts_file:
        answer_file(args, runtime, model, tokenizer)
    if args.chat:
        chat(args, runtime, model, tokenizer)


def answered(
    prompts: list[Any], first: int, args: Args, runtime: Runtime, model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[Any, str, bool]]:  # fmt: skip
    """(prompt, answer without the blanks around it but its indentation, whether it stopped)"""
    ids = [prompt_ids(prompt, model, tokenizer, args.text_format) for prompt in prompts]
    answers = generate_answers(ids, model, tokenizer, args, runtime, first=first)
    return [
        (prompt, re.sub(r"^ (?=\S)", "", answer.strip("\n").rstrip()), stopped)
        for prompt, (answer, stopped) in zip(prompts, answers, strict=True)
    ]


def answers_path(args: Args, model: GPT2LMHeadModel) -> Path:
    """Where the answers to --prompts_file go: beside it, by the name of the model that answers, and
    a sum of all that decides them."""
    name = (args.adapter_path or args.model_name_or_path) if uses_only(args) else args.output_dir
    settings = [getattr(args, name) for name in (*GENERATION_FLAGS, *DRAWING)]
    prompts = [prompt for prompt, _ in read_prompts(args)]
    decides = json.dumps([settings, prompts, modify_llm.fingerprint(model)])
    by = hashlib.sha256(decides.encode()).hexdigest()[:8]
    label = "-".join(Path(name).parts[-2:]).strip("/.-")
    return Path(f"{args.prompts_file}.{label}.{by}.answers.jsonl")


def answer_file(
    args: Args, runtime: Runtime, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes the answers to --prompts_file, each batch as it comes: stopped at any moment, the same
    command goes on with the rest."""
    path, prompts, done = answers_path(args, model), read_prompts(args), []
    if path.exists():
        done = [line + "\n" for line in path.read_text("utf-8").split("\n")[:-1]]
        if len(done) < len(prompts):
            del done[len(done) // ANSWERS_AT_ONCE * ANSWERS_AT_ONCE :]  # whole batches stay
    write_at_once(path, "".join(done))
    for first in tqdm(range(len(done), len(prompts), ANSWERS_AT_ONCE), "answering", leave=False):
        shown, fields = zip(*prompts[first : first + ANSWERS_AT_ONCE], strict=True)
        answers = answered(list(fields), first, args, runtime, model, tokenizer)
        rows = [
            {"prompt": prompt, "answer": answer, "stopped": stopped}
            for prompt, (_, answer, stopped) in zip(shown, answers, strict=True)
        ]
        with open(path, "a", encoding="utf-8") as file:
            file.write(as_lines(rows))
    table.info("Answers written to %s", path)


def read_prompts(args: Args) -> list[tuple[Any, dict]]:
    """The rows of fields, or else the lines, of --prompts_file: as they stand there, and their
    fields. Raises ValueError."""
    if not (path := args.prompts_file):
        return []
    is_lines, prompts = not data_pipeline.file_kind(path)[0], []
    try:
        if is_lines:
            read = filter(str.strip, Path(path).read_text("utf-8-sig").split("\n"))
        else:
            columns = data_pipeline.format_columns(args.text_format)
            read = data_pipeline.read_records(path, columns)
        for prompt in read:
            if not isinstance(prompt, str | dict):
                raise ValueError(f"{prompt!r:.40} is neither a text nor fields")
            fields = prompt_fields(prompt, args.text_format, literal=not is_lines)
            data_pipeline.check_text(json.dumps(prompt, ensure_ascii=False), "the prompt")
            prompts.append((prompt, fields))
        if not prompts:
            raise ValueError("holds no prompts")
    except Exception as error:  # of the libraries that read files
        raise ValueError(f"--prompts_file {path}: row {len(prompts) + 1}: {error}") from None
    return prompts


class ScreenStreamer(TextStreamer):
    """Shows an answer as it is written, and keeps its text."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def chat(
    args: Args, runtime: Runtime, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Answers what is typed. In the format of turns the model reads the whole conversation, or as
    much of its end as leaves room for an answer; in all others each question alone."""
    with suppress(ImportError):  # Windows has none
        importlib.import_module("readline")  # arrow keys
    turns: list[dict[str, str]] = []
    positions, is_chat = (
        model.config.n_positions - prefix_length(model),
        args.text_format == "messages",
    )
    room = positions - min(args.max_new_tokens, positions // 4)  # the rest is the answer's
    table.info("Ctrl-C ends an answer, Ctrl-D the chat")
    if not is_chat:
        table.info("The model was trained on single questions: it reads each one alone")
    while True:
        streamer = ScreenStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            prompt: Any = input("> ")
            turns.append({"role": "user", "content": prompt})
            if is_chat:
                prompt, before = {"messages": turns}, len(turns)
                while len(turns) > 1 and len(encode_prompt(prompt, "messages", tokenizer)) > room:
                    del turns[:2]
                if len(turns) < before:
                    table.info("(The first %d turns have no room any more)", before - len(turns))
            ids = prompt_ids(prompt, model, tokenizer, args.text_format)
            generate_answers([ids], model, tokenizer, args, runtime, streamer)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            table.info("%s", error)
        if turns and turns[-1]["role"] == "user":  # else Ctrl-C came before a question
            turns.append({"role": "assistant", "content": streamer.text.strip()})


def held_out_prompts(
    rows: AlpacaDataset, count: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, references), token ids, of the first held-out rows; a text without a prompt lends
    its first eight tokens."""
    prompts, references = [], []
    for row in range(min(count, len(rows))):
        ids, labels = (rows[row][name].tolist() for name in ("input_ids", "labels"))
        start = int(rows.prompt_lengths[row]) or min(8, len(ids) - 1)
        # Of several answers the first, without its end-of-text.
        answer = [*itertools.takewhile(lambda label: label != IGNORED, labels[start:])]
        prompts.append(ids[:start])
        references.append(answer[: -1 if answer[-1:] == [tokenizer.eos_token_id] else None])
    return prompts, references


def score_answers(
    answers: list[tuple[str, bool]], references: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:  # fmt: skip
    """sacrebleu's chrF (Popović, 2015) and BLEU over all answers, the share that stopped by
    themselves, and the mean lengths in tokens."""
    import sacrebleu

    texts, count = [answer for answer, _ in answers], len(answers)
    expected = [[tokenizer.decode(reference) for reference in references]]
    return {
        "eval_chrf": sacrebleu.corpus_chrf(texts, expected).score,
        "eval_bleu": sacrebleu.corpus_bleu(texts, expected).score,
        "eval_stopped": sum(stopped for _, stopped in answers) / count,
        "eval_answer_length": sum(len(tokenizer.encode(text)) for text in texts) / count,
        "eval_reference_length": sum(map(len, references)) / count,
    }


def scores_line(scores: dict[str, float]) -> str:
    return (
        "Held-out answers: chrF {eval_chrf:.1f}, BLEU {eval_bleu:.1f}, {eval_stopped:.0%} stop by "
        "themselves, {eval_answer_length:.0f} tokens (references {eval_reference_length:.0f})"
    ).format(**scores)


# ---- comparing techniques ------------------------------------------------------------------------


def compare(args: Args, runtime: Runtime) -> None:
    """--compare: an ordinary run of each technique in OUTPUT_DIR/NAME, at each rate and with each
    seed, and what came of them side by side. The same command goes on where it was stopped.

    Raises ValueError for a name that is none, Stopped.
    """
    known = {
        compared_name(technique, settings): {"modification_type": technique} | settings
        for technique, row in TECHNIQUES.items()
        for _, _, settings in row.compared
    }
    if unknown := {*args.compare} - known.keys():
        raise ValueError(f"--compare {min(unknown)}: not among {', '.join(known)}")
    rates, seeds = args.learning_rates or [args.learning_rate], range(args.seeds)
    plan = list(itertools.product(args.compare or known, rates, seeds))
    output_dir, rows = Path(args.output_dir), [untouched_base(args, runtime, len(plan))]
    for name, rate, seed in tqdm(plan, "comparing", disable=True if runtime.rank else None):
        several = f"-{rate}" * (len(rates) > 1) + f"-seed{args.seed + seed}" * (args.seeds > 1)
        directory = output_dir / f"{name}{several}"
        resume_from = "auto" if (directory / "run.json").exists() else None
        row = {"technique": name, "directory": str(directory), "settings": known[name]}
        start_peak_memory(runtime)
        try:
            chosen = resolve(vars(args) | known[name] | {
                "learning_rate": rate, "seed": args.seed + seed,
                "output_dir": str(directory), "resume_from": resume_from,
                "compare": None, "learning_rates": [], "seeds": 1,
            })  # fmt: skip
            row |= {"learning_rate": chosen.learning_rate, "seed": chosen.seed}
            with quiet_screen():
                train_model(chosen, runtime)
            row |= outcome(directory) if runtime.rank == 0 else {}
        except (ValueError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
            row["failed"] = in_one_line(error, {})
        rows.append(row)
        if runtime.rank == 0:
            failed = "{directory}: failed: {failed}" if "failed" in row else COMPARED
            table.info(failed.format(name=directory.name, **row))
            write_at_once(output_dir / "comparison.json", json.dumps(rows, indent=2))
    if runtime.rank == 0:
        show_comparison(rows, output_dir)


COMPARED_HEAD = (
    "run                          trainable    share  saved bytes    before     after    right"
)
COMPARED = (
    "{name:<26} {trainable:>11,} {share:>8.2%} {saved_bytes:>12,} {perplexity_before:>9.2f} "
    "{eval_perplexity:>9.2f} {eval_accuracy:>8.1%}"
)


def compared_name(technique: str, settings: dict[str, Any]) -> str:
    """What a row of TECHNIQUES' `compared` is called: "lora", "dora", "houlsby", "key_value"."""
    parts = []
    for flag, value in settings.items():
        values = [technique, *value] if isinstance(value, list) else [str(value)]
        parts += [flag.removeprefix(f"{technique}_")] if value is True else values
    return "-".join(parts) or technique


def untouched_base(args: Args, runtime: Runtime, runs: int) -> dict[str, Any]:
    """The row of the base itself, evaluated once; says how long so many runs may take."""
    tokenizer = tokenizer_for(args)
    model = modify_llm.load_base(args).requires_grad_(False)
    prepare_model(model, args, runtime)
    train, held_out = load_rows(args, tokenizer)
    if not len(held_out):
        raise ValueError("--compare: needs held-out rows, --eval_fraction or --eval_dataset_path")
    started = time.perf_counter()
    measured = evaluate_model(args, runtime, model, tokenizer, held_out)
    rows_a_step = args.batch_size * args.gradient_accumulation_steps * runtime.world_size
    rows = args.max_steps * rows_a_step or args.epochs * len(train)
    # A step costs three times an evaluation of its rows; each run evaluates at least twice.
    evaluations = 3 * rows / len(held_out) + 2
    minutes = (time.perf_counter() - started) * evaluations * runs / 60
    table.info("%d runs, roughly %.0f minutes; the same command goes on if stopped", runs, minutes)
    table.info(COMPARED_HEAD)
    return {"technique": "base", "trainable": 0} | measured


def outcome(directory: Path) -> dict[str, Any]:
    """What came of a finished run, by its files: the evaluation before its first step, its best
    one, sizes and time."""
    rows = pd.read_json(directory / "metrics.jsonl", lines=True)
    first, *others = rows.dropna(subset="eval_loss").to_dict("records")
    best = min(others, key=lambda row: row["eval_loss"])
    here = rows[rows.step == best["step"]].filter(like="eval").bfill().iloc[0]  # with its scores
    counts = modify_llm.read_json(directory / "run.json")["parameters"]
    progress = read_checkpoint(checkpoints(directory)[0], whole=False)["progress"]
    return here.to_dict() | {
        "best_step": best["step"],
        "trainable": counts["trainable"],
        "share": counts["trainable"] / counts["total"],
        "saved_bytes": sum(p.stat().st_size for p in directory.glob("final/*.safetensors")),
        "perplexity_before": first["eval_perplexity"],
        "seconds": progress.seconds,
        "peak_memory_gb": progress.peak_memory_gb,
    }


def show_comparison(rows: list[dict[str, Any]], output_dir: Path) -> None:
    """comparison.csv and .png, answers.md, and the closing words: of each technique its best rate,
    by the mean held-out loss over the seeds."""
    frame = pd.DataFrame(rows)
    frame.to_csv(output_dir / "comparison.csv", index=False)
    base, ended = frame.eval_loss[0], frame[1:].dropna(subset="eval_loss")
    if ended.empty:
        raise RuntimeError("--compare: no run came to its end")
    best, edge = [], {}
    for _, runs in ended.groupby("technique"):
        means = runs.groupby("learning_rate").agg(
            technique=("technique", "first"), trainable=("trainable", "first"),
            loss=("eval_loss", "mean"), deviation=("eval_loss", "std"),
        ).fillna(0.0).reset_index()  # fmt: skip
        best.append(means.loc[means.loss.idxmin()])
        at_edge = len(means) > 1 and means.loss.idxmin() in (0, len(means) - 1)
        edge[best[-1].technique] = "  (the last of the rates tried: try further ones)" * at_edge
    best = pd.DataFrame(best).sort_values("loss")
    table.info("\nThe best rate of each, by held-out loss (untouched base: %.4f):", base)
    for row in best.itertuples():
        spread = f" +- {row.deviation:.4f}" if row.deviation else ""
        values = (row.technique, row.loss, spread, row.learning_rate, edge[row.technique])
        table.info("%-26s %.4f%s at %g%s", *values)
    attempt("comparison.png", plot_comparison, best, base, output_dir / "comparison.png")
    attempt("answers.md", write_answers, ended.directory, output_dir / "answers.md")
    gain = base - best.loss
    small = best[gain >= 0.9 * gain.max()].sort_values("trainable").technique.iloc[0]
    words = "Best: %s. Best for its size, the smallest with nine tenths of that gain: %s"
    table.info(words, best.technique.iloc[0], small)


def plot_comparison(best: pd.DataFrame, base: float, path: Path) -> None:
    """Held-out loss over trainable parameters, the deviation over seeds as bars."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(10, 6), layout="constrained").subplots()
    axes.axhline(base, color="#888888", linestyle="--", label="untouched base")
    for loss in best.loss[best.technique == "full"]:
        axes.axhline(loss, color="#c44e52", linestyle=":", label="full fine-tuning")
    axes.errorbar(best.trainable, best.loss, best.deviation, fmt="o", capsize=4)
    for row in best.itertuples():
        axes.annotate(row.technique, (row.trainable, row.loss), (6, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="held-out loss per token")
    axes.margins(x=0.15)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes.figure.savefig(path, dpi=120)


def write_answers(directories: Iterable[str], path: Path) -> None:
    """answers.md: what each run answers to the same held-out prompts."""
    runs = {name: pd.read_json(f"{name}/predictions.jsonl", lines=True) for name in directories}
    columns = {Path(name).name: rows.tuned for name, rows in runs.items()}
    shared = next(iter(runs.values()))[["prompt", "reference", "base"]]
    parts = []
    for row in pd.concat([shared, pd.DataFrame(columns)], axis=1).to_dict("records"):
        parts += [f"**{name}**\n\n```\n{text}\n```\n" for name, text in row.items()] + ["---\n"]
    path.write_text("\n".join(parts), "utf-8")


# ---- the machine it runs on ----------------------------------------------------------------------


@dataclass
class Runtime:
    """The device, the arithmetic and this process's place among the others."""

    device: torch.device
    dtype: torch.dtype  # of matrix products and frozen weights; trainable weights stay fp32
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its own machine

    @property
    def fp16(self) -> bool:
        return self.dtype == torch.float16

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Adds up each value over the processes; exact for counts."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def place_of_process() -> dict[str, int]:
    """rank, world_size and local_rank by torchrun's environment variables. A rank counts only among
    several processes, since shells and batch systems leave such variables behind.

    Raises ValueError that names the variable.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    variables = {name: os.environ.get(name, "") for name in names}
    if variables["WORLD_SIZE"] in ("", "0", "1"):
        return {"world_size": 1, "rank": 0, "local_rank": 0}
    odd = [name for name in names[:4] if not variables[name].isdecimal()]
    odd += [] if variables["MASTER_ADDR"] else ["MASTER_ADDR"]
    odd += [] if odd or int(variables["RANK"]) < int(variables["WORLD_SIZE"]) else ["RANK"]
    if odd:
        raise ValueError(
            f"{odd[0]}={variables[odd[0]]} in the environment, with "
            f"WORLD_SIZE={variables['WORLD_SIZE']}: start with torchrun, or unset WORLD_SIZE"
        )
    return {name.lower(): int(variables[name]) for name in names[:3]}


def bf16_in_hardware(device: torch.device) -> bool:
    if device.type == "cuda":
        # A T4 would say yes by emulation, and crawl.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def unusable_gpu() -> str:
    """Why PyTorch cannot use the NVIDIA GPU of this machine, by its driver; "" where none is."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden on purpose
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    line = found.stdout.strip().partition("\n")[0]
    if found.returncode or not line:
        return f"nvidia-smi says: {line or found.stderr.strip() or found.returncode}"
    gpu, _, driver = line.rpartition(", ")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"{gpu}, driver {driver}: this PyTorch is {built} and cannot use it; install the build "
        "that fits the driver (README, Start)"
    )


def choose_device(wanted: str, world_size: int = 1, local_rank: int = 0) -> torch.device:
    """--device, this process's own GPU under torchrun. Raises ValueError for one not there."""
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True,
    }  # fmt: skip
    name = next(filter(available.get, available)) if wanted == "auto" else wanted
    reason = unusable_gpu() if wanted in ("auto", "cuda") and not available["cuda"] else ""
    if not available[name]:
        why = reason or "PyTorch finds none here"
        raise ValueError(f"--device {name}: {why}; auto takes what there is")
    if reason:
        logger.warning("Training on the %s, not on the GPU: %s", name, reason)
    if world_size > 1 and name == "mps":
        raise ValueError("--device mps: a Mac's GPU takes one process; torchrun with --device cpu")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= (gpus := torch.cuda.device_count()):
        raise ValueError(f"--device cuda: {gpus} GPUs here; torchrun with --nproc_per_node={gpus}")
    return torch.device("cuda", local_rank)


def choose_runtime(args: Args) -> Runtime:
    """Where and how the run computes; joins the other processes under torchrun. Raises ValueError
    for a device or precision that is not there."""
    place = place_of_process()
    device = choose_device(args.device, place["world_size"], place["local_rank"])
    cuda = device.type == "cuda"
    able = {"bf16": bf16_in_hardware(device), "fp16": cuda, "fp32": True}
    precision = args.precision
    if precision == "auto":
        precision = next(filter(able.get, able))
    if not able[precision]:
        raise ValueError(
            f"--precision {precision}: this {device.type} lacks it; auto takes what there is"
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    return_freed_memory()
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is still fp32
        # Where PyTorch prefers cuDNN's attention, as on an H100, each new width is planned anew.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if place["world_size"] > 1 and not dist.is_initialized():
        join_processes(device if cuda else None)
    return Runtime(device, dtype, **place)


def peak_memory(runtime: Runtime) -> float:
    """GB, since the run's start: of the GPU, or of this process where Linux tells; else 0."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found[1]) / 1e6
    return 0.0


def return_freed_memory() -> None:
    """Has glibc hand blocks of 16 MB and more back to the system as soon as they are freed.

    Its own limit rises to 32 MB, and below it blocks of ever other sizes leave holes in the heap:
    full fine-tuning of a GPT-2 of 16 million parameters grew by 22 MB a step.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**24)  # M_MMAP_THRESHOLD


def start_peak_memory(runtime: Runtime) -> None:
    """From here on `peak_memory` counts."""
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def join_processes(gpu: torch.device | None) -> None:
    """Waits until all processes are there, and says so where that takes longer than seconds."""
    waiting = "Process {RANK} waits for {WORLD_SIZE} in all, at {MASTER_ADDR}:{MASTER_PORT}"
    # Not by logging: of the other processes than 0 that is silent.
    waiting = f"train_llm.py: {waiting.format_map(os.environ)}"
    said = threading.Timer(5, print, [waiting], {"file": sys.stderr, "flush": True})
    said.start()
    # The others wait while process 0 answers prompts, writes and hashes: for hours at most, not
    # NCCL's ten minutes. One that fails ends them all at once, see `main`.
    backend = "nccl" if gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=3), device_id=gpu)
    finally:
        said.cancel()


class Screen(logging.Handler):
    """Lines on stdout, past a progress bar on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            line = self.format(record).encode(encoding, "ignore").decode(encoding)  # no emoji there
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # `train_llm.py | head`: the run goes on, its log file tells the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_ours(record: logging.LogRecord) -> bool:
    """A handler's filter: no HTTP client's lines but warnings. A table's have no prefix."""
    record.prefix = "" if record.name == "table" else f"{record.levelname}:{record.name}:"
    ours = {"root", __name__, "table", "data_pipeline", "modify_llm"}
    return record.levelno >= logging.WARNING or record.name in ours


@contextmanager
def logging_to_screen(rank: int) -> Iterator[None]:
    """Process 0 alone speaks. Afterwards logging is the caller's again."""
    root, bars = logging.getLogger(), is_progress_bar_enabled()
    before = root.handlers[:], root.level
    # What is logged before the run's log file opens is kept for it.
    root.handlers = [Screen(), MemoryHandler(sys.maxsize)] if rank == 0 else [logging.NullHandler()]
    for handler in root.handlers:
        handler.addFilter(is_ours)
        handler.setFormatter(logging.Formatter("%(prefix)s%(message)s"))
    root.setLevel(logging.INFO)
    disable_progress_bar()
    try:
        yield
    finally:
        root.handlers, level = before
        root.setLevel(level)
        if bars:
            enable_progress_bar()


@contextmanager
def quiet_screen() -> Iterator[None]:
    """Inside, only warnings reach the screen; a log file gets all."""
    screens = [h for h in logging.getLogger().handlers if isinstance(h, Screen)]
    for screen in screens:
        screen.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for screen in screens:
            screen.setLevel(logging.INFO)


def open_log_file(path: Path, closing: ExitStack) -> None:
    """Until `closing` closes, what is logged goes to a file too, and what was kept for it."""
    for kept in logging.getLogger().handlers:
        if isinstance(kept, MemoryHandler):  # not inside another program, whose logging this is
            file = logging.FileHandler(path, encoding="utf-8", errors="replace")
            file.setFormatter(kept.formatter)
            file.handleError = lambda record: None  # a full disk: what fails next tells it
            closing.callback(attempt, f"{path}", file.close)
            closing.callback(vars(kept).update, target=None, capacity=sys.maxsize)
            vars(kept).update(target=file, capacity=1)  # from now on at once
            kept.flush()


# ---- flags ---------------------------------------------------------------------------------------

above_zero = number(float, sys.float_info.min)


def temperature(text: str) -> float:
    """A flag's type: 0, or what logits can be divided by."""
    value = float(text)
    if not (value == 0 or 0.01 <= value <= 100):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 (greedy), or 0.01 to 100")
    return value


def rates(text: str) -> list[float]:
    """A flag's type: learning rates, separated by commas."""
    return [above_zero(part) for part in names(text)]


OPTIMISATION_FLAGS = {
    "epochs": Flag(3, number(int, 1), "passes over the training rows; >= 1"),
    "max_steps": Flag(0, number(int, 0), "optimizer steps; 0: by --epochs"),
    "learning_rate": Flag(None, above_zero, "peak of the schedule; > 0 (the technique's)"),
    "lora_plus_ratio": Flag(
        1.0, above_zero, "LoRA+: the rate of B, in multiples of A's; its paper: 16"
    ),
    "label_smoothing": Flag(0.0, number(float, 0, 1), "of the objective, not of logged losses"),
    "weight_decay": Flag(0.01, number(float, 0), "AdamW's, none on 1-D parameters; >= 0"),
    "adam_beta1": Flag(0.9, number(float, 0, 1), "AdamW's mean of the gradient; >= 0 and < 1"),
    "adam_beta2": Flag(0.999, number(float, 0, 1), "AdamW's mean of its square; >= 0 and < 1"),
    "adam_epsilon": Flag(1e-8, above_zero, "added to AdamW's denominator; > 0"),
    "max_grad_norm": Flag(1.0, number(float, 0), "gradients are clipped to it; 0: off"),
    "gradient_accumulation_steps": Flag(1, number(int, 1), "micro-batches a step; >= 1"),
    "scheduler": Flag(
        "warmup_cosine", ("warmup_cosine", "cosine", "linear", "constant"),
        "warmup_cosine, cosine, linear or constant, counted in optimizer steps",
    ),
    "warmup_steps": Flag(
        None, number(int, 0),
        "of all schedules but cosine (100, at most a tenth of the run; constant: 0)",
    ),
    "min_lr": Flag(0.0, number(float, 0), "where the decay ends; >= 0"),
    "compile": Flag(False, bool, "torch.compile each block: for GPUs (a CPU gets slower)"),
    "gradient_checkpointing": Flag(False, bool, "less memory for a third more time"),
}  # fmt: skip
EVALUATION_FLAGS = {
    "log_interval": Flag(10, number(int, 1), "optimizer steps; >= 1"),
    "eval_interval": Flag(0, number(int, 0), "optimizer steps; 0: each epoch"),
    "save_interval": Flag(0, number(int, 0), "optimizer steps; 0: each evaluation"),
    "save_total_limit": Flag(3, number(int, 1), "checkpoints kept; >= 1"),
    "early_stopping_patience": Flag(0, number(int, 0), "evaluations without gain; 0: off"),
    "num_samples": Flag(3, number(int, 0), "held-out prompts answered at each evaluation"),
    "eval_answers": Flag(0, number(int, 0), "scored by chrF and BLEU at each evaluation"),
    "report_to": Flag(
        [], lambda text: names(text.replace("none", "")),
        "tensorboard, wandb, trackio; several with commas (none)",
    ),
    "resume_from": Flag(None, nonempty, "auto, a run directory or a checkpoint (none: start)"),
    "overwrite_output_dir": Flag(False, bool, "remove the run that the directory holds"),
}  # fmt: skip
RUN_FLAGS = {
    "output_dir": Flag("./outputs", nonempty, "where the run is written"),
    "config": Flag(
        None, nonempty, "a run.json, JSON or YAML of flags; the command line stands above it (none)"
    ),
    "precision": Flag("auto", ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    "device": Flag("auto", ("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda or mps"),
    "demo": Flag(False, bool, "train a tiny GPT-2 on made-up tasks, then LoRA on it"),
}
COMPARISON_FLAGS = {
    "learning_rates": Flag([], rates, "each technique at each of them (its own)"),
    "seeds": Flag(1, number(int, 1), "each with so many seeds, from --seed on; >= 1"),
}
USE_FLAGS = {
    "adapter_path": Flag(
        None, nonempty, "start from, evaluate or prompt a run, or its best/ or final/ (none)"
    ),
    "eval_only": Flag(False, bool, "evaluate on the held-out rows, train nothing"),
    "max_new_tokens": Flag(128, number(int, 1), "of an answer; >= 1"),
    "temperature": Flag(0.0, temperature, "of sampling, 0.01 to 100; 0: greedy"),
    "top_p": Flag(
        0.95, number(float, sys.float_info.min, math.nextafter(1, 2)),
        "sample from the likeliest tokens of this probability; > 0, <= 1",
    ),
    "repetition_penalty": Flag(1.0, number(float, 1), "on tokens that were there; 1: off"),
    "no_repeat_ngram_size": Flag(0, number(int, 0), "no run of so many tokens twice; 0: off"),
    "num_beams": Flag(1, number(int, 1), "of beam search; 1: off"),
    "length_penalty": Flag(1.0, number(float, -100), "of beam search; > 0: longer answers"),
    "prompts_file": Flag(
        None, nonempty, "a prompt a line, or rows of fields (.jsonl, .json, .csv); answers go "
        "beside it (none)",
    ),
    "chat": Flag(False, bool, "talk to the model; Ctrl-C ends an answer, Ctrl-D the chat"),
}  # fmt: skip
TRAINING_DATA_FLAGS = DATA_FLAGS | {
    "text_format": DATA_FLAGS["text_format"]._replace(default="alpaca"),
    "eval_fraction": DATA_FLAGS["eval_fraction"]._replace(default=0.05),
    "num_workers": DATA_FLAGS["num_workers"]._replace(default=0),
    "split_seed": Flag(None, DATA_FLAGS["seed"].type, "of the held-out rows' draw (--seed)"),
}
FLAGS = TRAINING_DATA_FLAGS | modify_llm.MODEL_FLAGS | OPTIMISATION_FLAGS | EVALUATION_FLAGS
FLAGS |= RUN_FLAGS | USE_FLAGS | COMPARISON_FLAGS
PATH_FLAGS = {"dataset_path", "eval_dataset_path", "adapter_path", "model_name_or_path", "config"}
PATH_FLAGS |= {"tokenizer_name_or_path", "resume_from", "prompts_file"}
DEFAULTS = {name: flag.default for name, flag in FLAGS.items()} | {"prompt": [], "compare": None}
# What may differ between a run and its continuation; all else must be equal: it is the same run.
# Paths may, as the contents are compared; so may what cuts the same steps in another way.
FREE_TO_CHANGE = {*EVALUATION_FLAGS, *RUN_FLAGS, *USE_FLAGS, *PATH_FLAGS, *COMPARISON_FLAGS}
FREE_TO_CHANGE |= {"max_eval_samples", "epochs", "max_steps", "gradient_checkpointing", "compile"}
FREE_TO_CHANGE |= {"batch_size", "gradient_accumulation_steps", "num_workers", "prompt", "compare"}
OF_ONE_START = {"config", "resume_from", "overwrite_output_dir"}  # taken over from no file


def build_parser() -> argparse.ArgumentParser:
    """All flags. None has its default here, so that what was parsed is what was given."""
    parser = argparse.ArgumentParser(
        prog="train_llm.py",
        description="Fine-tune GPT-2 on instruction rows.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(__doc__.splitlines()[2:8]),
    )
    add_flags(parser, "data", TRAINING_DATA_FLAGS)
    modify_llm.add_model_flags(parser)
    add_flags(parser, "optimisation", OPTIMISATION_FLAGS)
    add_flags(parser, "evaluation and saving", EVALUATION_FLAGS)
    add_flags(parser, "run", RUN_FLAGS)
    add_flags(parser, "using a model", USE_FLAGS)
    add_flags(parser, "comparing techniques", COMPARISON_FLAGS)
    special = parser.add_argument_group("prompts and comparisons")
    special.add_argument(
        "--prompt", action="append", default=argparse.SUPPRESS, help="answer it; repeatable (none)"
    )
    special.add_argument(
        "--compare", nargs="?", const=[], type=names, default=argparse.SUPPRESS,
        help="run every technique on the rows, or these (none)",
    )  # fmt: skip
    return parser


def nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def parse_flags(argv: list[str] | None, where: str = "") -> dict[str, Any]:
    """The flags given on a command line, or in a file that stands for one (`where` names it).

    Raises ValueError.
    """
    try:
        given, unknown = build_parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{where}{error.argument_name}: {error.message}") from None
    if unknown:
        flag = unknown[0].partition("=")[0]
        did_you_mean = nearest(flag, [f"--{name}" for name in DEFAULTS])
        raise ValueError(f"{where}{flag}: no such flag{did_you_mean}")
    for name, value in vars(given).items():
        texts = value if isinstance(value, list) else [value]
        if any(data_pipeline.SURROGATES.search(str(text)) for text in texts):
            raise ValueError(f"{where}--{name}: {value!r} is not UTF-8")
    return vars(given)


def flags_of(path: Path, where: str, of_a_run: bool = False) -> dict[str, Any]:
    """The settings in a file, parsed as a command line of them would be. Those of a run may be
    another version's: what is not known is left out with a warning. Raises ValueError."""
    try:
        given = {name: value for name, value in read_settings(path).items() if value is not None}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if of_a_run:
        if unknown := given.keys() - DEFAULTS.keys():
            said = "%s: of another version, not taken over: %s"
            logger.warning(said, where, ", ".join(sorted(unknown)))
            given = {name: given[name] for name in given.keys() - unknown}
        # Its backslashes are read once more.
        given["text_format"] = str(given.get("text_format", "alpaca")).replace("\\", r"\\")
    prompts = given.pop("prompt", [])
    argv = [f"--prompt={text}" for text in (prompts if isinstance(prompts, list) else [prompts])]
    flags = parse_flags(modify_llm.command_line(given) + argv, f"{where}: ")
    return {name: flags[name] for name in flags.keys() - OF_ONE_START}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run.json, in a JSON or YAML file of flags, or in a checkpoint. Raises
    ValueError."""
    try:
        if STEP.fullmatch(path.name):
            return read_checkpoint(path, whole=False)["settings"]
        text = path.read_text("utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return dict(content.get("settings", content))
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"line {error.problem_mark.line + 1}: {error.problem}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as odd:
        raise ValueError(modify_llm.first_line(odd)) from None


def stored_flags(given: dict[str, Any]) -> dict[str, Any]:
    """What stands below the command line: the flags of --config, and below these those of the run
    that --resume_from continues. Raises ValueError."""
    config: dict[str, Any] = {}
    if path := given.get("config"):
        config = flags_of(Path(path), f"--config {path}")
    if not (wanted := given.get("resume_from")):
        return config
    run_dir, checkpoint = resumed_run(Args(**DEFAULTS | config | given))
    if checkpoint and checkpoint.parent.name != "checkpoints" and "output_dir" not in given:
        raise ValueError(
            f"--resume_from {wanted}: lies in no run; --output_dir DIR says where it goes on"
        )
    if wanted != "auto" and not (checkpoint or os.path.isdir(run_dir)):
        raise ValueError(f"--resume_from {wanted}: no such directory")
    stored: dict[str, Any] = {}
    for path in (run_dir / "run.json", *([checkpoint] if checkpoint else checkpoints(run_dir))):
        try:
            if path.exists():
                stored = flags_of(path, str(path), of_a_run=True)
                break
        except ValueError as error:
            logger.warning("%s; its settings are not taken over", error)
    if "epochs" in given | config:
        stored.pop("max_steps", None)  # it would stand above them
    elsewhere = {} if "output_dir" in given else {"output_dir": str(run_dir)}
    return stored | config | elsewhere


def resumed_run(args: Args) -> tuple[Path, Path | None]:
    """(the directory of the run that --resume_from continues, the checkpoint that it names, itself
    or as the target of a link). A checkpoint that lies in no run goes on in --output_dir."""
    path = Path(os.path.abspath(args.resume_from))
    for checkpoint in (path, path.resolve()):
        if STEP.fullmatch(checkpoint.name):
            in_run = checkpoint.parent.name == "checkpoints"
            return checkpoint.parent.parent if in_run else Path(args.output_dir), checkpoint
    path = Path(args.output_dir if args.resume_from == "auto" else args.resume_from)
    return path.parent if path.name == "checkpoints" else path, None


def resolve(given: dict[str, Any]) -> Args:
    """All flags: those given, the others at their defaults. Raises ValueError where they conflict.

    With --adapter_path, what it was trained with are the defaults of the model's and text's flags.
    """
    defaults, adapter_path = dict(DEFAULTS), given.get("adapter_path")
    saved: dict[str, Any] = {}
    if adapter_path:
        adapter_path = str(modify_llm.result_directory(adapter_path))
        given = given | {"adapter_path": adapter_path}
        with suppress(ValueError):  # load_trained tells
            saved = trained_settings(Path(adapter_path))
        known = {*modify_llm.MODEL_FLAGS, "text_format", "max_length"}
        known |= {"split_seed", "eval_fraction"} if given.get("eval_only") else set()
        defaults |= {name: value for name, value in saved.items() if name in known}
        defaults["model_name_or_path"] = None
        for name in given.keys() & saved.keys() & modify_llm.MODEL_FLAGS.keys():
            if given[name] != saved[name]:
                raise ValueError(f"--{name}: {adapter_path} was trained with {saved[name]}")
    else:
        model = given.get("model_name_or_path", "")
        defaults |= modify_llm.prompt_settings(model)
    args = Args(**defaults | given)
    modify_llm.check_together(args)
    if problem := conflict(args):
        raise ValueError(problem)
    if args.learning_rate is None and args.compare is None:
        args.learning_rate = TECHNIQUES[args.modification_type].learning_rate(args)
    if args.split_seed is None:
        args.split_seed = args.seed
    return args


def uses_only(args: Args) -> bool:
    """Whether a model is evaluated or prompted, and nothing is trained."""
    asked = args.prompt or args.prompts_file or args.chat
    return args.eval_only or bool(asked and not args.dataset_path)


def conflict(args: Args) -> str:
    """The first conflict between several flags; "" where there is none."""
    unknown = ", ".join({*args.report_to} - {"tensorboard", "wandb", "trackio"})
    missing = ", ".join(name for name in args.report_to if not find_spec(name))
    conflicts = {
        "--gradient_checkpointing: drops the cache that carries a prefix":
            args.gradient_checkpointing and args.modification_type == "prefix",
        "--eval_only: needs --eval_dataset_path, or --dataset_path to hold rows out of":
            args.eval_only and not (args.dataset_path or args.eval_dataset_path),
        "--dataset_path: needed to train (or --demo)":
            not (args.dataset_path or args.demo or uses_only(args)),
        f"--min_lr {args.min_lr}: above --learning_rate {args.learning_rate}":
            args.min_lr > (args.learning_rate or math.inf),
        f"--prompts_file {args.prompts_file}: its directory cannot be written to":
            args.prompts_file and not os.access(Path(args.prompts_file).resolve().parent, os.W_OK),
        "--chat: with --adapter_path, after training": args.chat and not uses_only(args),
        "--num_beams: neither draws (--temperature) nor streams (--chat)":
            args.num_beams > 1 and (args.temperature or args.chat),
        "--eval_answers: needs the package: pip install sacrebleu":
            args.eval_answers and not find_spec("sacrebleu"),
        "--from_scratch: --adapter_path brings the base that it was trained on":
            args.adapter_path and args.from_scratch,
        "--demo: starts anew, without --resume_from, --adapter_path, --compare and torchrun":
            args.demo and (
                args.resume_from or args.adapter_path or args.compare is not None
                or place_of_process()["world_size"] > 1
            ),
        "--compare: trains anew and goes on by itself, without --resume_from, --adapter_path, "
        "--overwrite_output_dir and prompts": args.compare is not None and (
            args.resume_from or args.adapter_path or args.overwrite_output_dir or args.prompt
            or args.prompts_file or uses_only(args)
        ),
        f"--report_to {unknown}: tensorboard, wandb or trackio": unknown,
        f"--report_to {missing}: needs the package: pip install {missing}": missing,
        "--overwrite_output_dir: would remove the run that --resume_from continues":
            args.resume_from and args.overwrite_output_dir,
    }  # fmt: skip
    return next((message for message, holds in conflicts.items() if holds), "")


def idle_flags(given: dict[str, Any], args: Args) -> list[str]:
    """A line for each flag that was given and changes nothing."""
    used_by_demo = {"demo", "output_dir", "overwrite_output_dir", "device", "precision", "seed"}
    unused = {*OPTIMISATION_FLAGS, *EVALUATION_FLAGS} - {"resume_from"}
    unused |= set() if args.adapter_path else {"modification_type"}
    prompts = {"eval_dataset_path", "eval_fraction", "batch_size"}
    unused = unused - {"eval_answers"} if args.eval_only else unused | prompts
    idle = {
        "--demo has its own": DEFAULTS.keys() - used_by_demo if args.demo else (),
        "nothing is trained": unused if uses_only(args) else (),
        "--scheduler cosine has no warm-up": ["warmup_steps"] * (args.scheduler == "cosine"),
        "--scheduler constant does not decay": ["min_lr"] * (args.scheduler == "constant"),
        "--temperature 0 takes the likeliest token": ["top_p"] * (not args.temperature),
        "it is for --num_beams": ["length_penalty"] * (args.num_beams == 1),
        "only lora has a B": ["lora_plus_ratio"] * (args.modification_type != "lora"),
        "it is for --compare": COMPARISON_FLAGS if args.compare is None else (),
        "the rows of --eval_dataset_path are held out":
            ["eval_fraction"] * bool(args.eval_dataset_path),
    }  # fmt: skip
    reasons = {name: reason for reason, flags in reversed(idle.items()) for name in flags}
    lines = [f"--{n}: without effect, {reasons[n]}" for n in sorted(reasons.keys() & given.keys())]
    others = args.adapter_path or args.demo or args.compare is not None
    return lines + ([] if others else modify_llm.idle_flags(given, args))


# ---- the script ----------------------------------------------------------------------------------


def use_model(args: Args, runtime: Runtime) -> None:
    """--eval_only and --prompt without training: what --adapter_path holds, or the plain base."""
    tokenizer = tokenizer_for(args)
    torch.manual_seed(args.seed)
    if args.adapter_path:
        model = load_trained(args.adapter_path, args.model_name_or_path)
    else:
        model = modify_llm.load_base(args)
    model.requires_grad_(False)
    prepare_model(model, args, runtime)  # at the precision that it was trained and evaluated with
    check_fits(model, tokenizer, args.max_length if args.eval_only else 1)
    if args.eval_only:
        evaluate_model(args, runtime, model, tokenizer, load_rows(args, tokenizer)[1])
    answer_prompts(args, runtime, model, tokenizer)


def evaluate_model(
    args: Args, runtime: Runtime, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase,
    rows: AlpacaDataset,
) -> dict[str, float]:  # fmt: skip
    """Logs how a model does on held-out rows, and returns it by the names of metrics.jsonl."""
    loader = make_loader(rows, args, runtime, tokenizer, shuffle=False)
    loss, tokens, accuracy = evaluate(SummedLoss(model), loader, runtime)
    line = "Held-out loss: %.4f | Held-out PPL: %.2f | %s tokens of %s rows, %.1f%% right"
    values = (loss, perplexity(loss), f"{tokens:,}", f"{len(rows):,}", 100 * accuracy)
    table.info(line, *values)
    scores = {}
    if args.eval_answers and runtime.rank == 0:
        prompts, references = held_out_prompts(rows, args.eval_answers, tokenizer)
        answers = generate_answers(prompts, model, tokenizer, args, runtime)
        scores = score_answers(answers, references, tokenizer)
        table.info(scores_line(scores))
    results = {"eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_accuracy": accuracy}
    return results | scores


DEMO_FILES = data_pipeline.BUNDLED_SAMPLE.parent
DEMO = {
    "demo": True, "max_length": 64, "text_format": "{input}\n{instruction}|| {output}",
    "max_new_tokens": 8,
}  # fmt: skip
DEMO_BASE = DEMO | {
    "dataset_path": str(DEMO_FILES / "demo_base.json"), "from_scratch": True, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "modification_type": "full", "epochs": 6, "learning_rate": 3e-3, "batch_size": 16,
    "num_samples": 0, "eval_interval": 429,
}  # fmt: skip
DEMO_LORA = DEMO | {
    "dataset_path": str(DEMO_FILES / "demo_tasks.json"),
    "eval_dataset_path": str(DEMO_FILES / "demo_questions.json"),
    "lora_rank": 8, "lora_alpha": 16, "epochs": 10, "learning_rate": 1e-2, "batch_size": 32,
    "num_samples": 1, "eval_interval": 125,
}  # fmt: skip


def demo(args: Args, runtime: Runtime) -> None:
    """A tiny GPT-2 from scratch on small tasks, then LoRA, which teaches it new names for them; at
    the end, how many held-out questions each answers rightly."""
    output_dir = Path("./outputs/demo" if args.output_dir == "./outputs" else args.output_dir)
    args.output_dir, args.from_scratch = str(output_dir), True  # base/ is its own to write, too
    with suppress(ValueError, KeyError, TypeError):  # an earlier demo is the demo's to overwrite
        settings = modify_llm.read_json(output_dir / "run.json")["settings"]
        args.overwrite_output_dir |= settings["demo"]
    user = {name: getattr(args, name) for name in ("device", "precision", "seed")}
    with ExitStack() as closing:
        claim_directory(args, runtime, closing)
        scratch = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        if args.overwrite_output_dir:
            clear_directory(output_dir)
        # Threads would meet after each small product, and on a busy machine wait there for minutes.
        closing.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        table.info("Demo, part 1 of 2: a tiny GPT-2 learns tasks by name, from random weights\n")
        train_model(resolve(DEMO_BASE | user | {"output_dir": str(scratch / "run")}), runtime)
        shutil.move(scratch / "run" / "best", output_dir / "base")
        table.info("\nDemo, part 2 of 2: LoRA teaches it other names for them\n")
        base = {"model_name_or_path": str(output_dir / "base"), "output_dir": str(output_dir)}
        lora = resolve(DEMO_LORA | user | base)
        train_model(lora, runtime)
        show_demo_answers(lora, runtime)


def show_demo_answers(args: Args, runtime: Runtime) -> None:
    """Five held-out questions with their answers, and how many of all are answered rightly."""
    output_dir, rows = Path(args.output_dir), pd.read_json(args.eval_dataset_path, dtype=False)
    shown = pd.DataFrame({"question": rows.input + ": " + rows.instruction})
    tokenizer = tokenizer_for(args)
    ids = [encode_prompt(row, args.text_format, tokenizer) for row in rows.to_dict("records")]
    models = {"base": modify_llm.load_base(args), "tuned": load_trained(f"{args.output_dir}/final")}
    for name, model in models.items():
        prepare_model(model.requires_grad_(False), args, runtime)
        answers = generate_answers(ids, model, tokenizer, args, runtime)
        shown[name] = [answer.strip() for answer, _ in answers]
    shown["right answer"] = rows.output
    table.info("\nHeld-out questions, on lists of words that are in neither part's rows:\n")
    head = shown.head().apply(lambda column: column.str.ljust(column.str.len().max()))
    table.info(head.to_string(index=False, justify="left"))
    right = [int((shown[name] == rows.output).sum()) for name in models]
    table.info("\nRight answers of %d: base %d, tuned %d", len(rows), *right)
    row = COMPARED.format(name="lora", **outcome(output_dir))
    table.info("\nAs --compare shows a technique:\n%s\n%s\n", COMPARED_HEAD, row)
    table.info("The model is tiny, the tasks are made up of some 60 words, and it knows no others.")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; what goes wrong is told in one line on stderr.

    In another program, KeyboardInterrupt is raised: it is not for this function to swallow.
    """
    status, given, rank = 1, {}, 0
    with ExitStack() as closing:
        try:
            closing.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # no harm
            rank = place_of_process()["rank"]
            closing.enter_context(logging_to_screen(rank))
            given = parse_flags(argv)
            args = resolve(stored_flags(given) | given)
            for line in idle_flags(given, args):
                logger.warning(line)
            work = use_model if uses_only(args) else train_model
            work = demo if args.demo else work if args.compare is None else compare
            work(args, choose_runtime(args))
            status = 0
        except Stopped as stopped:
            status = 128 + stopped.args[0]
        except KeyboardInterrupt:  # asked twice, or before there was anything to save
            status = 130
            if __name__ != "__main__":  # it is the notebook's, or the host program's, to end
                raise
        except (ValueError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
            process = f"process {rank}: " if rank else ""
            print(f"train_llm.py: error: {process}{in_one_line(error, given)}", file=sys.stderr)
            # 2: the input's or the flags' fault
            status = 1 if isinstance(error, RuntimeError | MemoryError) else 2
        finally:
            leave_group(status)
    return status


# What PyTorch says when memory is short
OUT_OF_MEMORY = "not enough memory|annot allocate memory|can't allocate memory|ALLOC_FAILED"


def in_one_line(error: Exception, given: dict[str, Any]) -> str:
    """What went wrong, and what to do where memory was short or a path misspelt."""
    reason, lines = modify_llm.first_line(error), str(error).strip().splitlines()
    if reason.startswith("Caught "):  # in a worker, whose own error ends the traceback
        reason += f" {lines[-1]}"
    for path in [given[name] for name in PATH_FLAGS & given.keys()]:
        directory, name = os.path.split(path)
        beside = directory or os.curdir
        if path in reason and not os.path.exists(path) and os.path.isdir(beside):
            reason += nearest(name, os.listdir(beside))
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if no_memory or re.search(OUT_OF_MEMORY, reason):
        hint = "lower --batch_size (and raise --gradient_accumulation_steps) or --max_length"
        reason = f"out of memory: {hint}, or --precision bf16: {reason}"
    return reason


def leave_group(status: int) -> None:
    """Leaves the other processes. After an error at once: they may wait for this one in a
    collective operation, and torchrun ends them when it is gone."""
    if not dist.is_initialized():
        return
    if error := sys.exception():  # not one of those that are told in one line
        traceback.print_exception(error)
    if error or status in (1, 2):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Rows are tokenised before workers fork, so the library's warning about that is mistaken.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="ignore")  # a terminal that cannot show the emoji
    sys.exit(main())
