"""Fine-tune GPT-2 on instruction rows with LoRA, adapters, prefixes, freezing or in full.

    python train_llm.py --demo    # no download, a minute on a CPU
    python train_llm.py --dataset_path alpaca_data.json --output_dir ./outputs
    python train_llm.py --dataset_path alpaca_data.json --resume_from auto
    python train_llm.py --adapter_path outputs/best --prompt "Name a colour."
    torchrun --nproc_per_node=2 train_llm.py --dataset_path alpaca_data.json

There is one loop for all techniques (`train`): a technique only decides which parameters train.
A batch's way: the loader's padded rows -> loss_inputs -> SummedLoss -> train_step.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import errno
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import filelock
import torch
import torch.distributed as dist
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

import data_pipeline
import modify_llm
from data_pipeline import (
    DATA_FLAGS,
    IGNORED,
    WIDTH_MULTIPLE,
    AlpacaDataset,
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
    parsed,
    save_trained,
    trained_settings,
)

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
    (batch, length, heads, head size). The queries stand at the end of the keys."""
    queries, keys = query.shape[2], key.shape[2]
    if query.device.type == "cpu" and not dropout:
        return block_attention(query, key, value, scaling).transpose(1, 2), None
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


QUERY_BLOCK = 128  # queries at a time in a CPU's attention


class BlockAttention(torch.autograd.Function):
    """Causal attention a block of queries at a time, for CPUs: a whole LoRA step on short rows in
    bf16 is 12% faster than with PyTorch's own kernel. The plain version, to which a test holds it
    equal:

        scores = scaling * query @ key.transpose(-1, -2)
        later = torch.ones_like(scores, dtype=torch.bool).triu(keys - queries + 1)
        scores.masked_fill(later, -math.inf).softmax(-1) @ value

    query (n, queries, head size), key and value (n, keys, head size); the queries stand at the end
    of the keys, of which there are more where a prefix or a cache comes first.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output, weights = torch.empty_like(query), []
        for block, seen in query_blocks(query, key):
            q, k, v = query[:, block], key[:, :seen], value[:, :seen]
            length = q.shape[1]
            mask = q.new_full((length, seen), -math.inf).triu_(seen - length + 1)
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling)
            weights.append(scores.softmax(-1))  # (n, length, seen)
            output[:, block] = torch.bmm(weights[-1], v)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (query, key, value, *weights), scaling = ctx.saved_tensors, ctx.scaling
        query_grad = torch.empty_like(query)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for p, (block, seen) in zip(weights, query_blocks(query, key), strict=True):
            q, k, v, output_grad = query[:, block], key[:, :seen], value[:, :seen], grad[:, block]
            value_grad[:, :seen].baddbmm_(p.transpose(1, 2), output_grad)
            p_grad = torch.bmm(output_grad, v.transpose(1, 2))
            scores_grad = torch.ops.aten._softmax_backward_data(p_grad, p, -1, p.dtype)
            query_grad[:, block] = torch.bmm(scores_grad, k).mul_(scaling)
            key_grad[:, :seen].baddbmm_(scores_grad.transpose(1, 2), q, alpha=scaling)
        return query_grad, key_grad, value_grad, None


def query_blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, int]]:
    """(a block of queries, the number of keys up to its end)"""
    queries, keys = query.shape[1], key.shape[1]
    for start in range(0, queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries)
        yield slice(start, end), keys - queries + end


@torch.compiler.disable  # its loop over blocks would be compiled anew for each width
def block_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """BlockAttention of (batch, heads, length, head size)."""
    flat = (x.flatten(0, 1) for x in (query, key, value))
    return BlockAttention.apply(*flat, scaling).view(query.shape)


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


def make_optimizer(model: GPT2LMHeadModel, args: argparse.Namespace) -> torch.optim.AdamW:
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


def learning_rate_at(step: int, total: int, args: argparse.Namespace) -> float:
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
            speed = runtime.sum_over_ranks(tokens)[0] / (time.perf_counter() - clock)
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
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
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
    state, loss = run.progress, 0.0
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
        patience = run.args.early_stopping_patience
        state.stopped_early = bool(patience) and state.evaluations_without_gain >= patience
    worse = state.first_loss is not None and before <= state.first_loss < loss
    if worse or state.evaluations_without_gain == 2:
        trouble = (
            "is above that before the first step" if worse else "has not fallen for two evaluations"
        )
        advice = "try a lower --learning_rate or fewer --epochs; best/ holds the best so far"
        logger.warning("The held-out loss %s: %s", trouble, advice)


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
    samples = []
    for prompt, (answer, _) in zip(prompts[: args.num_samples], answers, strict=False):
        text = tokenizer.decode(prompt)
        asked = text if len(text) <= 60 else "..." + text[-60:].partition(" ")[2]
        logger.info("Sample: %r -> %r", asked, textwrap.shorten(answer, 160, placeholder=" ..."))
        samples.append(f"**{text}** {answer}")
    if samples:
        report(run, {"samples": "\n\n".join(samples)}, step)
    if args.eval_answers and prompts:
        scored = slice(args.eval_answers)
        run.scores = score_answers(answers[scored], references[scored], tokenizer)
        write_metrics(run, {"step": step, "epoch": run.epoch_of(step), **run.scores})
        table.info("%s | %s", run.place(step), scores_line(run.scores))


# ---- a run, from flags that are in range to final/ -----------------------------------------------


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


@dataclass
class Run:
    """The parts of one training run, as `prepare` makes them."""

    args: argparse.Namespace
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
    scores: dict[str, float] = field(default_factory=dict)  # of the latest --eval_answers

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.batch_sampler.steps

    @property
    def rows_per_step(self) -> int:
        return self.loader.batch_sampler.global_size

    def epoch_of(self, step: int) -> int:
        return max(0, step - 1) // self.steps_per_epoch

    def place(self, step: int) -> str:
        """A step of the run as the log names it: by its epoch, and the step of this epoch."""
        steps, epoch = self.steps_per_epoch, self.epoch_of(step)
        return f"Epoch {epoch} | Step {step - epoch * steps:{max(4, len(str(steps)))}}/{steps}"

    def told_to_stop(self) -> bool:
        """A single process at any moment; several after a step, when all have heard of it."""
        return self.stopping or (self.runtime.world_size == 1 and self.signal is not None)

    def stop_evaluating(self) -> bool:
        """Asked before each batch of an evaluation, of which all processes have as many."""
        if self.runtime.world_size > 1:
            self.stopping = self.runtime.sum_over_ranks(self.signal is not None)[0] > 0
        return self.told_to_stop()


class Stopped(Exception):
    """A signal, the argument, asked for the end; a checkpoint is written."""


def train_model(args: argparse.Namespace, runtime: Runtime) -> None:
    """One training run, from flags that are in range to final/.

    Raises ValueError or OSError for bad input, with nothing written; RuntimeError for a failure
    later on; Stopped.
    """
    started = time.perf_counter()
    with ExitStack() as closing:
        claim_directory(args, runtime, closing)
        if runtime.world_size > 1:
            dist.barrier()
        run = prepare(args, runtime)
        at_hand = (args, runtime, run.model, run.tokenizer)
        if finished(run):
            logger.info("The run in %s is finished; nothing to do", run.output_dir)
            if runtime.rank == 0:
                write_extras(run)
            answer_prompts(*at_hand)
            return
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
            name, hint = signal.Signals(*stopped.args).name, "; --resume_from auto goes on"
            hint = "" if args.demo else hint
            logger.info("Stopped by %s at step %d%s", name, run.progress.step, hint)
            raise
        except (ValueError, OSError, SafetensorError) as error:  # not the input's fault any more
            if isinstance(error, ConnectionError):  # of a dead worker: PyTorch's signal names it
                time.sleep(1)
            raise RuntimeError(error) from error


def prepare(args: argparse.Namespace, runtime: Runtime) -> Run:
    """Everything that can be found wrong before the first step, in memory: nothing is written.

    Raises ValueError.
    """
    with one_first(runtime):
        if not (args.adapter_path or args.from_scratch):
            modify_llm.locate(args.model_name_or_path)  # out of reach: told before rows are read
        tokenizer = tokenizer_for(args)
        for flag in ("dataset_path", "eval_dataset_path") if runtime.world_size > 1 else ():
            if path := getattr(args, flag):  # downloaded once
                train, test = args.dataset_train_split, args.dataset_test_split
                splits = data_pipeline.wanted_splits(flag, train, test)
                next(
                    data_pipeline.read_rows(
                        path, args.text_format, flag, args.dataset_config, splits
                    )
                )
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
    for prompt in read_prompts(args):  # raises for one that cannot be put, before the run
        prompt_ids(prompt, model, tokenizer, args.text_format)
    refuse_to_overwrite_inputs(run)
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


def tokenizer_for(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer of the flags, else the model's own; random weights have GPT-2's."""
    if args.tokenizer_name_or_path:
        return load_tokenizer(args.tokenizer_name_or_path)
    base = None if args.from_scratch else args.model_name_or_path
    if args.adapter_path and not base:
        base = trained_settings(Path(args.adapter_path)).get("base_model_name_or_path")
    return model_tokenizer(base, args.adapter_path)


FEW_TOKENS = 1000  # held out: a perplexity of fewer says little


def load_rows(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[AlpacaDataset, AlpacaDataset]:
    """(training rows, held-out rows); rows with nothing to learn are left out and counted."""

    reading = {name: getattr(args, name) for name in data_pipeline.READING_FLAGS}
    own_split = args.eval_dataset_path or args.dataset_test_split

    def labelled(flag: str) -> AlpacaDataset:
        path = getattr(args, flag) or args.dataset_path
        dataset = load_dataset(path, tokenizer, flag=flag, **reading)
        keep = dataset.label_counts > 0
        if not keep.any():
            raise ValueError(f"--{flag} {path}: no row is left to learn from")
        if not keep.all():
            logger.info("%d rows with nothing to learn are left out of %s", (~keep).sum(), path)
        return dataset.select(keep)

    if own_split:
        held_out = labelled("eval_dataset_path")
        # --eval_only may know no rows that were trained on.
        train = labelled("dataset_path") if args.dataset_path else held_out.split(1, args.seed)[0]
    else:
        train, held_out = labelled("dataset_path").split(args.eval_fraction, args.seed)
    if not len(held_out if args.eval_only else train):
        purpose = "evaluate" if args.eval_only else "train"
        raise ValueError(f"--eval_fraction {args.eval_fraction}: leaves no row to {purpose} on")
    limit = args.max_eval_samples
    if args.max_samples and not (limit or own_split):  # the same share of fewer rows
        share = args.eval_fraction / (1 - args.eval_fraction)
        limit = max(1, round(args.max_samples * share))
    if args.early_stopping_patience and not len(held_out):
        needs = f"needs held-out rows, --eval_fraction {args.eval_fraction} leaves none"
        raise ValueError(f"--early_stopping_patience: {needs}")
    held_out = held_out.first(limit)
    if 0 < (tokens := int(held_out.label_counts.sum())) < FEW_TOKENS:
        logger.warning("%d tokens are held out: a perplexity of so few says little", tokens)
    train = train.first(args.max_samples)
    trains = args.adapter_path or not args.eval_only
    if trains and (shared := data_pipeline.rows_in_common(held_out, train)):
        logger.warning("%d of %d held-out rows are also trained on", shared, len(held_out))
    return train, held_out


def make_loader(
    rows: AlpacaDataset, args: argparse.Namespace, runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase, **options: Any,
) -> DataLoader:  # fmt: skip
    """This process's micro-batches, each of rows of about one length."""
    return final_dataset_loader(
        rows, tokenizer=tokenizer, padding="longest", group_by_length=True, seed=args.seed,
        max_length=args.max_length,
        batch_size=args.batch_size, num_workers=args.num_workers, rank=runtime.rank,
        world_size=runtime.world_size, **options,
    )  # fmt: skip


def make_model(
    args: argparse.Namespace, runtime: Runtime, tokenizer: PreTrainedTokenizerBase
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


def build_model(args: argparse.Namespace) -> GPT2LMHeadModel:
    """The model to train: the base with the technique, or what --adapter_path holds."""
    torch.manual_seed(args.seed)
    base = Path(args.output_dir, "base")
    if args.adapter_path:
        model = load_trained(args.adapter_path, args.model_name_or_path, dropout=args.dropout)
    elif args.from_scratch and args.resume_from and checkpoints(base.parent) and base.is_dir():
        model = final_modify(args, from_scratch=False, model_name_or_path=str(base))
    else:
        model = final_modify(args)
    model.modification |= {"text_format": args.text_format, "max_length": args.max_length}
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
    ids = 1 + max(tokenizer.get_vocab().values())
    if ids > config.vocab_size:
        embeddings = f"the model has embeddings for {config.vocab_size}"
        raise ValueError(f"--tokenizer_name_or_path: {ids} token ids, {embeddings}")


def prepare_model(model: GPT2LMHeadModel, args: argparse.Namespace, runtime: Runtime) -> None:
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


def check_processes_agree(run: Run) -> None:
    """Raises ValueError, on every process, where one is about to do other work than process 0: on
    a machine that does not see the shared directory, with another card, with other rows."""
    settings = vars(run.args)
    facts = {f"--{name}": settings[name] for name in settings if name not in FREE_TO_CHANGE} | {
        "step": run.progress.step,
        "precision": str(run.runtime.dtype),
        "steps in all": run.total_steps,
        "training rows (sha256)": run.dataset_hash,
        "held-out rows (sha256)": run.held_out_hash,
        "base model (sha256)": run.model.base_fingerprint,
        "final/ there": finished(run),
    }
    first, *others = gather(facts, run.runtime)
    for rank, other in enumerate(others, 1):
        for name in first:
            if first[name] != other[name]:
                differs = f"{name} is {other[name]}, that of process 0 {first[name]}"
                same = "all need the same files, a shared --output_dir and the same kind of device"
                raise ValueError(f"process {rank}: {differs}; {same}")


def refuse_to_overwrite_inputs(run: Run) -> None:
    """Raises ValueError where --overwrite_output_dir would remove what this run reads."""
    args = run.args
    written = [path.resolve() for path in written_by_a_run(run.output_dir)]
    inputs = (args.adapter_path, run.model.base_path, args.dataset_path, args.eval_dataset_path)
    inputs += (args.prompts_file,)
    for used in filter(None, inputs if args.overwrite_output_dir else ()):
        if any(Path(used).resolve().is_relative_to(path) for path in written):
            needed = f"would remove {used}, which this run needs"
            raise ValueError(f"--overwrite_output_dir: {needed}")


def summary(run: Run) -> str:
    """What is about to happen, in a few lines."""
    args, runtime, rows = run.args, run.runtime, run.train_rows
    total, trainable = run.counts
    tokens, labels = int(rows.lengths.sum()), int(rows.label_counts.sum())
    batch = f"{args.batch_size} x {args.gradient_accumulation_steps} x {runtime.world_size}"
    rate = f"{args.scheduler} from {args.learning_rate:g}, warm-up {args.warmup_steps:,}"
    name, dtype = run.model.base_name or "random weights", str(runtime.dtype)
    technique = run.model.modification["modification_type"]
    lines = {
        "Device": f"{runtime.device}, {dtype.removeprefix('torch.')}, "
        f"processes: {runtime.world_size}",
        "Model": f"{name}, {technique}: {trainable / total:.2%} trains",
        "Rows": f"{len(rows):,} to train on, {len(run.eval_rows):,} held out",
        "Tokens": f"{tokens:,} an epoch, {labels:,} with a label",
        "Steps": f"{run.total_steps:,} of {batch} rows; {rate}",
    }
    if runtime.device.type == "cuda":
        free, on_card = torch.cuda.mem_get_info()
        lines["Memory"] = f"{free / 1e9:.1f} of the card's {on_card / 1e9:.1f} GB are free"
        lines |= batch_size_hint(args, tokens / len(rows)) if free > on_card / 2 else {}
    return "\n".join(f"   {title + ':':<8} {line}" for title, line in lines.items())


GPU_TOKENS = 4000  # a micro-batch; with far fewer, a GPU waits for the launches of its kernels


def batch_size_hint(args: argparse.Namespace, tokens_per_row: float) -> dict[str, str]:
    """A line where a micro-batch is so small that a GPU waits for launches most of the time."""
    tokens = args.batch_size * tokens_per_row
    if tokens >= GPU_TOKENS:
        return {}
    size = args.batch_size * 2 ** math.ceil(math.log2(GPU_TOKENS / tokens))
    try_it = f"--batch_size {size}, with fewer --gradient_accumulation_steps for the same steps"
    return {"Hint": f"{tokens:,.0f} tokens a micro-batch leave a GPU waiting; try {try_it}"}


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
    state, output_dir = run.progress, run.output_dir
    if run.runtime.rank != 0:
        return
    write_model(run, "final")
    write_extras(run)
    if state.best_loss is not None:
        before = f"{perplexity(state.first_loss):.2f} before, " if state.first_loss else ""
        after, best = perplexity(state.last_loss), perplexity(state.best_loss)
        words = "Held-out perplexity: %s%.2f after %d steps, best %.2f at step %d"
        table.info(words, before, after, state.step, best, state.best_step)
    if run.scores:
        table.info(scores_line(run.scores))
    if run.runtime.device.type == "cuda":
        table.info("Peak GPU memory: %.2f GB", torch.cuda.max_memory_allocated() / 1e9)
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    table.info("Time: %d min %02d s", minutes, seconds)
    if run.args.demo and run.args.from_scratch:  # the first part's directory is a temporary one
        return
    names = ["best", "final", "metrics.jsonl", *EXTRAS]
    written = [name for name in names if (output_dir / name).exists()]
    table.info("Written to %s: %s", output_dir, ", ".join(written))
    best_is_there = step_of(output_dir / "best") == state.best_step
    use = shlex.quote(str(output_dir / ("best" if best_is_there else "final")))
    prompt, text_format = '"..."', run.args.text_format
    if "||" in text_format and len(fields := prompt_columns(text_format)) > 1:
        prompt = shlex.quote(json.dumps(dict.fromkeys(fields, "...")))
    table.info("Try it: python train_llm.py --adapter_path %s --prompt %s", use, prompt)


# ---- what a run writes ---------------------------------------------------------------------------


OUTPUTS = (  # what a run writes, and --overwrite_output_dir removes
    "run.json", "run.json.new", "metrics.jsonl", "metrics.jsonl.new", "training_curves.png",
    "predictions.jsonl",
    "training_*.log", "checkpoints", "best", "final", "base", "tensorboard",
)  # fmt: skip
STAGED = re.compile(r"\.(?P<state>new|old|trash)_(?P<name>best|final|base|step_\d+)(_[0-9a-f]{8})?")
# What a file system says that has no locks, or cannot sync a directory
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
CARD = "README.md"  # not under the checksums: whoever publishes a model edits it


def claim_directory(args: argparse.Namespace, runtime: Runtime, closing: ExitStack) -> None:
    """Makes and locks the output directory until `closing` closes, and puts right what a crash
    left there. A directory made for a run that is then refused is removed again.

    Raises ValueError for one that is not to be had.
    """
    if runtime.rank != 0:
        return
    output_dir = Path(args.output_dir)
    refuse_used_directory(args)
    made: list[Path] = []
    try:
        closing.callback(lock_directory(output_dir, made).release)
    except filelock.Timeout:
        stale = f"if none is (a run killed on another host), remove {output_dir / '.lock'}"
        raise ValueError(f"--output_dir {output_dir}: another run writes there; {stale}") from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in UNSUPPORTED:
            unwritable = f"cannot be written to: {error.strerror}"
            raise ValueError(f"--output_dir {output_dir}: {unwritable}") from None
        unguarded = "its file system has no locks: see that no second run writes there"
        logger.warning("--output_dir %s: %s", output_dir, unguarded)
    closing.callback(remove_unused, made)  # while the lock is held
    refuse_used_directory(args)  # another run may have come and gone meanwhile
    recover_and_clean(output_dir)


def lock_directory(output_dir: Path, made: list[Path]) -> filelock.BaseFileLock:
    """Makes a directory and locks it; `made` gets it and the parents that were made for it,
    innermost first. Raises filelock.Timeout, OSError."""
    # A singleton: this process may take it more than once.
    lock = filelock.FileLock(output_dir / ".lock", is_singleton=True)
    for _ in range(10):
        made[:] = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
        output_dir.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            lock.acquire(timeout=10)  # a killed run's DataLoader workers hold it for seconds
            if Path(lock.lock_file).exists():
                return lock
            lock.release()
        # Another start was refused, and has removed the directory that it had made.
    raise filelock.Timeout(lock.lock_file)


def remove_unused(directories: list[Path]) -> None:
    """Removes directories, innermost first, where the first holds nothing but its lock."""
    with suppress(OSError):
        if directories and {path.name for path in directories[0].iterdir()} <= {".lock"}:
            (directories[0] / ".lock").unlink(missing_ok=True)
            for directory in directories:
                directory.rmdir()


def refuse_used_directory(args: argparse.Namespace) -> None:
    """A run is never written over by accident, nor continued in the directory of another one."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir}: is a file")
    signs = ["run.json", "metrics.jsonl", "checkpoints", "best", "final", *EXTRAS]
    signs += ["base"] if args.from_scratch else []
    holds_run = any((output_dir / name).exists() for name in signs)
    continued = args.resume_from and resumed_directory(args).resolve() == output_dir.resolve()
    if holds_run and not continued and not args.overwrite_output_dir:
        ways_out = "--resume_from auto, or --overwrite_output_dir"
        raise ValueError(f"--output_dir {output_dir}: holds a run; {ways_out}")


def recover_and_clean(output_dir: Path) -> None:
    """After a crash: puts back what was moved away for a replacement that never came, removes what
    was half-written."""
    for path in [*output_dir.glob(".*"), *output_dir.glob("checkpoints/.*")]:
        staged = STAGED.fullmatch(path.name)
        if not staged:
            continue
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


def written_by_a_run(output_dir: Path) -> Iterator[Path]:
    """What a run wrote into a directory."""
    return itertools.chain.from_iterable(output_dir.glob(pattern) for pattern in OUTPUTS)


def clear_directory(output_dir: Path) -> None:
    """Removes what a run wrote, and nothing else; of a link to a directory its contents."""
    for path in written_by_a_run(output_dir):
        shutil.rmtree(path.resolve()) if path.is_dir() else path.unlink()
        if path.is_symlink():
            path.resolve().mkdir()


@contextmanager
def whole_directory(output_dir: Path, name: str) -> Iterator[Path]:
    """A directory to fill; only when it is whole, with sha256 sums, and synced, does it become
    output_dir/name. It is filled beside what it replaces, so on the same disk."""
    path = output_dir / name
    new, old = staging(path, "new"), staging(path, "old")
    path.parent.mkdir(exist_ok=True)
    try:
        new.mkdir()
        yield new
        modify_llm.write_manifest(new, leave_out=CARD)
        for item in [*new.iterdir(), new]:
            sync(item)
        if path.exists():
            move_away(path, old)
        new.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
    shutil.rmtree(old, ignore_errors=True)  # on NFS a file that is still read stays for a while


def staging(path: Path, state: str) -> Path:
    """A name beside `path` that nothing has: .new_best_1f0c92ab."""
    return path.with_name(f".{state}_{path.name}_{uuid.uuid4().hex[:8]}")


def move_away(path: Path, target: Path) -> None:
    """Renames a directory; one of a container image's layers, which cannot be, is copied."""
    try:
        path.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.move(path, target)


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


def attempt(what: str, work: Callable[..., object], *args: object) -> bool:
    """Does what a run can do without: where it fails, a warning says so and the run goes on."""
    try:
        work(*args)
        return True
    except Exception as error:
        logger.warning("%s: %s; the run goes on without", what, modify_llm.first_line(error))
        return False


def start_tracker(run: Run, name: str, closing: ExitStack) -> None:
    """Adds a function to run.trackers that takes numbers and texts by name, and their step."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run.output_dir / name, purge_step=run.progress.step + 1)
        closing.callback(attempt, name, writer.close)
        writer.add_text("settings", f"```\n{yaml.safe_dump(vars(run.args))}```")

        def log(values: dict[str, float | str], step: int) -> None:
            for key, value in values.items():
                add = writer.add_text if isinstance(value, str) else writer.add_scalar
                add(key, value, step)

    else:
        tracker = importlib.import_module(name)  # trackio is called as wandb is
        project = os.environ.get(f"{name.upper()}_PROJECT", "train_llm")
        tracker.init(project=project, config=vars(run.args))
        closing.callback(attempt, name, tracker.finish)

        def log(values: dict[str, float | str], step: int) -> None:
            texts = {key: value for key, value in values.items() if isinstance(value, str)}
            tables = {key: tracker.Table(columns=[key], data=[[texts[key]]]) for key in texts}
            tracker.log(values | tables, step=step)

    run.trackers[name] = log


def report(run: Run, values: dict[str, float | str], step: int) -> None:
    """To all trackers; one that fails is left out from there on."""
    for name, log in list(run.trackers.items()):
        if not attempt(f"--report_to {name}", log, values, step):
            del run.trackers[name]


def start_records(run: Run, closing: ExitStack) -> None:
    """Clears what --overwrite_output_dir says to clear; then run.json, metrics.jsonl and the log
    file begin."""
    args, output_dir, runtime = run.args, run.output_dir, run.runtime
    if runtime.rank != 0:
        return
    if args.overwrite_output_dir:
        clear_directory(output_dir)
    resumed = run.progress if run.resumed_from is not None else None
    if resumed:
        for name in EXTRAS:  # an earlier end's, of a run that goes on
            (output_dir / name).unlink(missing_ok=True)
        for path in checkpoints(output_dir):
            if checkpoint_step(path) > resumed.step:  # of the way that is left
                logger.info("%s is removed: the run goes on from step %d", path, resumed.step)
                remove_checkpoint(path)
    cut_metrics(output_dir / "metrics.jsonl", resumed)
    log = output_dir / f"training_{datetime.now():%Y%m%d_%H%M%S}.log"
    closing.enter_context(log_file(log))
    for name in args.report_to:
        attempt(f"--report_to {name}", start_tracker, run, name, closing)
    total, trainable = run.counts
    new = output_dir / "run.json.new"
    modify_llm.write_json(new, {
        "settings": vars(args),
        "versions": {
            "python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "dataset_sha256": run.dataset_hash,
        "held_out_sha256": run.held_out_hash,
        "parameters": {"total": total, "trainable": trainable},
        "world_size": runtime.world_size,
        "device": str(runtime.device),
        "dtype": str(runtime.dtype),
    })  # fmt: skip
    new.replace(output_dir / "run.json")  # on a full disk the one before stays


def cut_metrics(path: Path, progress: Progress | None) -> None:
    """Drops the rows that a run resumed at `progress` writes again: after its step, and an
    evaluation still due."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):  # the half-written last line of a kill
            row = json.loads(line)
            due = progress and progress.evaluation_due and "eval_loss" in row
            if progress and row["step"] < progress.step + (not due):
                rows.append(line + "\n")
    new = path.with_name("metrics.jsonl.new")
    new.write_text("".join(rows), encoding="utf-8")
    new.replace(path)  # at once: a kill in between must not lose the rows


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
    with whole_directory(run.output_dir, name) as directory:
        save_trained(run.model, directory)
        data_pipeline.save_tokenizer(run.tokenizer, directory, run.args.text_format)
        attempt("the model card", write_card, run, directory)


def step_of(directory: Path) -> int | None:
    """The step of the model in best/ or final/, None where there is none."""
    return data_pipeline.read_settings(directory / modify_llm.METADATA).get("step")


def write_card(run: Run, directory: Path) -> None:
    (directory / CARD).write_text(model_card(run), encoding="utf-8")


def model_card(run: Run) -> str:
    """README.md for best/ and final/: base, technique, data, settings, results, how to load."""
    args, state, base = run.args, run.progress, run.model.base_name or "base"
    (total, trainable), technique = run.counts, run.model.modification["modification_type"]
    name = f"{Path(base).name} (a local model)" if Path(base).exists() else base
    library = "peft"
    load = [f'model = AutoModelForCausalLM.from_pretrained("{"BASE" if name != base else base}")']
    load += ['model = PeftModel.from_pretrained(model, "DIR")  # peft']
    if modify_llm.is_plain(technique):
        load = ['model = AutoModelForCausalLM.from_pretrained("DIR")  # transformers']
        library = "transformers"
    elif TECHNIQUES[technique].layout == "state":  # a format of ours alone
        load, library = [], ""
    settings = [*OPTIMISATION_FLAGS, "batch_size", "max_length", *TECHNIQUES[technique].flags]
    chosen = vars(args) | run.model.modification
    losses = [loss for loss in (state.first_loss, state.last_loss) if loss is not None]
    results = " -> ".join(f"{perplexity(loss):.2f}" for loss in losses) or "not evaluated"
    dataset = f"{len(run.train_rows):,} rows of {Path(args.dataset_path).name}"
    return modify_llm.card_metadata(base, library) + "\n".join([
        f"# {technique} on {name}", "",
        f"- Trained: {trainable:,} of {total:,} parameters ({trainable / total:.2%}), "
        f"{state.step:,} steps",
        f"- Data: {dataset}, format {args.text_format!r}",
        f"- Held-out perplexity, {len(run.eval_rows):,} rows: {results}",
        *([f"- {scores_line(run.scores)}"] if run.scores else []),
        "", "| setting | value |", "| --- | --- |",
        *(f"| {setting} | {chosen[setting]} |" for setting in settings),
        "", "```python", *load,
        'model = modify_llm.load_trained("DIR")  # with modify_llm.py, all techniques', "```", "",
        'In the terminal: `python train_llm.py --adapter_path DIR --prompt "..."`', "",
    ])  # fmt: skip


def write_predictions(run: Run) -> None:
    """predictions.jsonl: the reference, the untouched base's answer and the tuned model's."""
    tokenizer, count = run.tokenizer, run.args.num_samples
    prompts, references = held_out_prompts(run.eval_rows, count, tokenizer)
    if not prompts:
        return
    settings = (tokenizer, run.args, run.runtime)
    tuned = generate_answers(prompts, run.model, *settings)
    chosen = argparse.Namespace(
        from_scratch=False, model_name_or_path=run.model.base_name, dropout=0.0
    )
    base = modify_llm.load_base(chosen).requires_grad_(False)
    prepare_model(base, run.args, run.runtime)
    untuned, rows = generate_answers(prompts, base, *settings), []
    for i, (answer, stopped) in enumerate(tuned):
        row = {"prompt": tokenizer.decode(prompts[i]), "reference": tokenizer.decode(references[i])}
        rows.append(row | {"base": untuned[i][0], "tuned": answer, "stopped": stopped})
    write_rows(run.output_dir / "predictions.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def plot_curves(run: Run) -> None:
    """training_curves.png: loss, perplexity, learning rate and gradient norm over the steps."""
    import pandas as pd
    from matplotlib.figure import Figure

    rows = pd.read_json(run.output_dir / "metrics.jsonl", lines=True).set_index("step")
    titles = {"loss": "loss per token", "perplexity": "perplexity"}
    titles |= {"lr": "learning rate", "grad_norm": "gradient norm"}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        curves = rows.reindex(columns=[key, f"eval_{key}"])
        raw, held_out = (curves[name].dropna() for name in curves)
        points = 1 if key == "lr" else max(1, len(raw) // 10)  # the rate is exact, not noisy
        smooth = raw.rolling(points, min_periods=1).mean()
        axes.plot(raw, ".-", color="#4c72b0", alpha=0.3)
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
        if not (run.output_dir / name).exists():
            attempt(name, write, run)


# ---- checkpoints and resuming --------------------------------------------------------------------


def save_checkpoint(run: Run) -> None:
    """checkpoints/step_N: trainable weights, optimizer, random states, progress. What rotates out
    is removed."""
    runtime, step = run.runtime, run.progress.step
    tensors = {"trainable": run.trainable, "random": gathered_random_states(runtime)}
    if runtime.rank != 0:
        return
    tensors["optimizer"] = {
        f"{name}.{key}": value
        for name, parameter in run.trainable.items()
        for key, value in run.optimizer.state[parameter].items()
    }
    with whole_directory(run.output_dir, f"checkpoints/step_{step:08d}") as directory:
        for name, group in tensors.items():
            group = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(group, directory / f"{name}.safetensors")
        modify_llm.write_json(directory / "state.json", {
            "progress": asdict(run.progress),
            "settings": vars(run.args),
            "world_size": runtime.world_size,
            "dtype": str(runtime.dtype),
            "total_steps": run.total_steps,
            "rows_per_step": run.rows_per_step,
            "dataset_sha256": run.dataset_hash,
            "held_out_sha256": run.held_out_hash,
            "base_fingerprint": run.model.base_fingerprint,
            "grad_scaler": run.scaler.state_dict(),
        })  # fmt: skip
    others = [path for path in checkpoints(run.output_dir) if checkpoint_step(path) != step]
    for path in others[run.args.save_total_limit - 1 :]:
        if checkpoint_step(path) not in (run.progress.best_step, run.resumed_from):
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """At once, so that no half of it is ever found."""
    try:
        trash = staging(path, "trash")
        move_away(path, trash)
        shutil.rmtree(trash)
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", path, error)


def random_states(runtime: Runtime) -> dict[str, Tensor]:
    """The states of this process's generators, by kind of device."""
    states, kind = {"cpu": torch.get_rng_state()}, runtime.device.type
    return states if kind == "cpu" else states | {kind: getattr(torch, kind).get_rng_state()}


def set_random_states(states: dict[str, Tensor]) -> None:
    for kind, state in states.items():
        (torch if kind == "cpu" else getattr(torch, kind)).set_rng_state(state)


def gathered_random_states(runtime: Runtime) -> dict[str, Tensor]:
    """The states of every process's generators: {"cpu.0": ..., "cuda.0": ..., "cpu.1": ...}"""
    gathered = gather(random_states(runtime), runtime)
    return {
        f"{kind}.{rank}": s for rank, states in enumerate(gathered) for kind, s in states.items()
    }


def gather(value: Any, runtime: Runtime) -> list[Any]:
    """What each process holds, by rank."""
    gathered = [value] * runtime.world_size
    if runtime.world_size > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def checkpoints(output_dir: Path) -> list[Path]:
    """checkpoints/step_*, newest first."""
    found = output_dir.glob("checkpoints/step_*")
    found = [path for path in found if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step, reverse=True)


def resume(run: Run) -> None:
    """Continues from --resume_from: under auto from the newest good checkpoint, with a warning for
    each bad one.

    Raises ValueError for a checkpoint of another run, or a bad one that was asked for by its path.
    """
    wanted, root = run.args.resume_from, resumed_directory(run.args)
    by_path = named_checkpoint(run.args)
    for path in [by_path] if by_path else checkpoints(root):
        try:
            state = read_checkpoint(path)
            if not (other_run := difference(run, state)):
                check_shapes(run, state)
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            if by_path:
                raise ValueError(f"--resume_from {path}: {reason}") from None
            logger.warning("Checkpoint skipped: %s: %s", path, reason)
            continue
        if other_run:
            new_run = "a new run takes another --output_dir, without --resume_from"
            raise ValueError(f"--resume_from {path}: {other_run}; {new_run}")
        restore(run, state)
        logger.info("Resumed from %s at step %d", path, run.progress.step)
        for line in changes(run, state):
            logger.info("%s", line)
        return
    if wanted != "auto":
        missing = "no such directory, or no good checkpoint in it"
        raise ValueError(f"--resume_from {wanted}: {missing}")
    if (root / "final").exists() and not checkpoints(root):  # they were removed
        starts_over = "but a result: --overwrite_output_dir in its place starts over"
        raise ValueError(f"--resume_from auto: no checkpoint in {root}, {starts_over}")
    none = "--resume_from auto: no good checkpoint in %s, starting at step 0"
    logger.warning(none, run.output_dir)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, verified by its checksums; nothing is unpickled.

    Raises ValueError.
    """
    modify_llm.verify_directory(path)
    state = modify_llm.read_json(path / "state.json")
    for name in ("trainable", "optimizer", "random"):
        state[name] = modify_llm.read_tensors(path / f"{name}.safetensors")
    try:
        state["progress"] = Progress(**state["progress"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"state.json: {error}") from None
    return state


def difference(run: Run, state: dict) -> str:
    """What sets the run that wrote a checkpoint apart from this one; nothing: ""."""
    if run.args.warmup_steps is None:  # a longer run keeps its warm-up
        run.args.warmup_steps = state["settings"].get("warmup_steps")
    for name, now in vars(run.args).items():
        before = state["settings"].get(name, DEFAULTS[name])  # newer flags: as if not given
        if name not in FREE_TO_CHANGE and before != now:
            return f"was trained with --{name} {before}, not {now}"
    rows, steps = state.get("rows_per_step"), state.get("total_steps", 0)
    if rows != run.rows_per_step:
        product = "--batch_size x --gradient_accumulation_steps x processes"
        return f"took {rows} rows a step ({product}), not {run.rows_per_step}"
    if steps > run.total_steps:
        return f"was to take {steps} steps, not {run.total_steps}: a run may grow, not shrink"
    if state["dataset_sha256"] != run.dataset_hash:
        return "the dataset has changed since (its content hash differs)"
    if state["base_fingerprint"] != run.model.base_fingerprint:
        return "was trained on another base model"
    return ""


def changes(run: Run, state: dict) -> list[str]:
    """A line for each thing that is another one from here on."""
    runtime, lines = run.runtime, []
    if state["world_size"] != runtime.world_size:
        lines += [f"By {runtime.world_size} processes from here on, not {state['world_size']}"]
    if f"{runtime.device.type}.{runtime.world_size - 1}" not in state["random"]:
        lines += ["Random states of processes or devices that were not there are seeded anew"]
    if state["dtype"] != str(runtime.dtype):
        lines += [f"In {runtime.dtype} from here on, not {state['dtype']}"]
    if state["total_steps"] < run.total_steps:
        longer = f"The run grows from {state['total_steps']} to {run.total_steps} steps"
        lines += [f"{longer}: from here on with the learning rates of the longer one"]
    if state["held_out_sha256"] != run.held_out_hash:
        lines += ["Other held-out rows from here on: the best loss is sought anew"]
    elif run.output_dir.resolve() != (root := resumed_directory(run.args)).resolve():
        lines += [f"best/ of the steps before stays in {root}: here the best loss is sought anew"]
    return lines


def check_shapes(run: Run, state: dict) -> None:
    """Raises ValueError unless a checkpoint holds the tensors that this run trains, and no more."""
    expected = {name: parameter.shape for name, parameter in run.trainable.items()}
    for name, shape in [*expected.items()] if state["progress"].step else ():
        moments = {f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape}
        expected |= {f"{name}.step": ()} | moments
    tensors = state["trainable"] | state["optimizer"]
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name} is {found.get(name)}, this run's {expected.get(name)}")


def restore(run: Run, state: dict) -> None:
    """Puts a checkpoint's tensors, progress and random state into the run."""
    run.progress = progress = state["progress"]
    run.resumed_from = progress.step
    if resumed_directory(run.args).resolve() != run.output_dir.resolve():
        progress.best_loss, progress.best_step = None, 0  # best/ stays there
    if state["held_out_sha256"] != run.held_out_hash:
        progress.best_loss = progress.first_loss = progress.last_loss = None
        progress.best_step = progress.evaluations_without_gain = 0
        progress.evaluation_due = True
    patience = run.args.early_stopping_patience
    progress.stopped_early = 0 < patience <= progress.evaluations_without_gain
    modify_llm.put_tensors(run.model, state["trainable"], run.output_dir)
    for name, parameter in run.trainable.items() if run.progress.step else ():
        run.optimizer.state[parameter] = {
            key: state["optimizer"][f"{name}.{key}"].to(parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    if state["grad_scaler"] and run.runtime.fp16:  # empty from a run that needed none
        run.scaler.load_state_dict(state["grad_scaler"])
    rank, states = run.runtime.rank, state["random"]
    torch.manual_seed(run.args.seed + rank + 100_003 * progress.step)  # where there is no state
    kinds = [kind for kind in ("cpu", run.runtime.device.type) if f"{kind}.{rank}" in states]
    set_random_states({kind: states[f"{kind}.{rank}"] for kind in kinds})


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
BEAM_SETTINGS = ("num_beams", "length_penalty")


def prompt_columns(text_format: str) -> list[str]:
    """The columns that stand before the response."""
    prompts = {"alpaca": data_pipeline.PROMPT_WITH_INPUT, "output": "{output}"}
    before_response = prompts.get(text_format, text_format.split("||")[0])
    columns = data_pipeline.format_columns(text_format)
    return [name for name in columns if f"{{{name}}}" in before_response]


class Text(str):
    """A prompt that is a text even where it looks like a JSON object."""


def prompt_fields(prompt: Any, text_format: str) -> dict[str, Any]:
    """The fields of a row that a prompt gives: a text is the only one before the response.

    For formats with several, and for turns, it may be a dict or JSON object of them; null is
    empty. Raises ValueError for a field that is missing.
    """
    given, text = (prompt, "") if isinstance(prompt, dict) else ({}, str(prompt))
    if text.lstrip().startswith("{") and text_format != "output" and not isinstance(prompt, Text):
        with suppress(ValueError, RecursionError):
            given = json.loads(text)
    data_pipeline.check_names(given, data_pipeline.format_columns(text_format))
    if text_format == "messages":
        is_turns = given.keys() & {"messages", "conversations"}
        if isinstance(prompt, dict) and not is_turns:
            raise ValueError("its fields are neither 'messages' nor 'conversations'")
        return given if is_turns else {"messages": [{"role": "user", "content": text}]}
    columns, read = data_pipeline.format_columns(text_format), prompt_columns(text_format)
    required = [name for name in read if name != "input"] or read  # an input may be empty
    fields = {name: "" if value is None else str(value) for name, value in given.items()}
    if not given and len(required) == 1:
        fields = {required[0]: text}
    if missing := [name for name in required if name not in fields]:
        needs = "" if given else "give a JSON object, "
        raise ValueError(f"the format reads {read}; {needs}{missing[0]!r} is missing")
    return dict.fromkeys(columns, "") | fields


def prompt_ids(
    prompt: Any, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, text_format: str
) -> list[int]:
    """The tokens of a prompt in the run's own format. Raises ValueError for one too long."""
    try:
        fields = prompt_fields(prompt, text_format)
        ids = data_pipeline.encode_prompt(fields, text_format, tokenizer)
        if len(ids) + prefix_length(model) >= (positions := model.config.n_positions):
            raise ValueError(f"{len(ids)} tokens leave no room in {positions} positions")
    except ValueError as error:
        where = "--prompt, --prompts_file or --chat"
        raise ValueError(f"{where}: {str(prompt)[:40]!r}...: {error}") from None
    return ids or [tokenizer.eos_token_id]


@contextmanager
def answering(model: GPT2LMHeadModel, runtime: Runtime, **settings: Any) -> Iterator[None]:
    """Inside, the model generates by these settings alone, whatever its base's
    generation_config.json says, and with a mask, which padding on the left needs."""
    training, before = model.training, model.generation_config
    attention, pad_token_id = model.config._attn_implementation, model.config.pad_token_id
    model.config.pad_token_id = None  # or transformers warns of padding after an answer's end
    model.set_attn_implementation("sdpa")
    model.eval()
    model.generation_config = GenerationConfig(**settings)
    try:
        with torch.no_grad(), runtime.autocast():
            yield
    finally:
        model.generation_config, model.config.pad_token_id = before, pad_token_id
        model.set_attn_implementation(attention)
        model.train(training)


def drawn_by_row(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Logits (rows, vocabulary) whose largest is a draw from the softmax of those given: Gumbel
    noise is added (Maddison et al., 2014, section 2). Each row has its own generator, so that an
    answer does not depend on those beside it, and training's random state is left alone."""
    noise = torch.empty_like(logits)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return logits - noise.log()


def generate_answers(
    prompts: list[list[int]], model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace, runtime: Runtime, streamer: TextStreamer | None = None,
) -> list[tuple[str, bool]]:  # fmt: skip
    """(answer, whether it stopped by itself) for the ids of each prompt, in batches of about one
    length. Equal prompts draw different answers. streamer: shows the answer to a single one."""
    room, eos = model.config.n_positions - prefix_length(model), tokenizer.eos_token_id
    limits = [min(args.max_new_tokens, room - len(ids)) for ids in prompts]
    settings = {name: getattr(args, name) for name in BEAM_SETTINGS}
    settings |= {"do_sample": False, "eos_token_id": eos, "pad_token_id": eos}
    answers: dict[int, tuple[str, bool]] = {}
    size = max(1, ANSWERS_AT_ONCE // args.num_beams)
    quiet = True if streamer or not prompts else None
    bar = tqdm(total=sum(limits), desc="answering", unit="tok", leave=False, disable=quiet)
    left = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while left:
        limit = limits[left[0]]
        batch = [i for i in left[:size] if limits[i] == limit]
        left = left[len(batch) :]
        rows = [torch.tensor(prompts[i], device=runtime.device) for i in batch]
        ids = pad_sequence(rows, batch_first=True, padding_value=eos, padding_side="left")
        ones = [torch.ones_like(row) for row in rows]
        mask = pad_sequence(ones, batch_first=True, padding_side="left")
        with answering(model, runtime, **settings, max_new_tokens=limit):
            output = model.generate(
                ids, attention_mask=mask, streamer=streamer,
                logits_processor=processors(args, ids, [args.seed + i for i in batch], bar),
            )  # fmt: skip
        output = output[:, ids.shape[1] :].tolist()
        bar.update(len(batch) * (limit - len(output[0])))  # what early ends have saved
        for i, answer in zip(batch, output, strict=True):
            stopped = eos in answer
            text = tokenizer.decode(answer[: answer.index(eos)] if stopped else answer)
            # a character may be cut in half
            answers[i] = (text if stopped else text.removesuffix("\ufffd"), stopped)
    bar.close()
    return [answers[i] for i in range(len(prompts))]


def processors(
    args: argparse.Namespace, prompts: Tensor, seeds: list[int], bar: tqdm
) -> LogitsProcessorList:
    """What changes the logits before the largest is taken. The repetition penalty (Keskar et al.,
    2019, section 4.1) is for what the answer itself has said, not for its prompt or the padding."""
    penalty, width = args.repetition_penalty, prompts.shape[1]

    def centred(_ids: Tensor, logits: Tensor) -> Tensor:
        # The penalty divides positive logits; GPT-2's lie around -100, where it would be a ban.
        # The median, since some may be -inf. Beam search has log-probabilities to add up.
        beams = args.num_beams > 1
        return logits if beams else logits - logits.median(1, keepdim=True).values

    chain = [centred, RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=width)]
    if args.no_repeat_ngram_size:  # transformers' own setting would ban the prompt's names, too
        no_repeat = NoRepeatNGramLogitsProcessor(args.no_repeat_ngram_size)
        chain += [lambda ids, logits: no_repeat(ids[:, width:], logits)]
    generators = [torch.Generator(prompts.device).manual_seed(seed) for seed in seeds]
    if args.temperature:
        chain += [TemperatureLogitsWarper(args.temperature), TopPLogitsWarper(args.top_p)]

    def draw(_ids: Tensor, logits: Tensor) -> Tensor:
        bar.update(len(seeds))
        return drawn_by_row(logits, generators) if args.temperature else logits

    return LogitsProcessorList([*chain, draw])


def answer_prompts(
    args: argparse.Namespace, runtime: Runtime, model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    """Prints the answer to each --prompt, writes those to --prompts_file, and chats."""
    if runtime.rank != 0:
        return
    prompts = read_prompts(args)
    encoded = [prompt_ids(prompt, model, tokenizer, args.text_format) for prompt in prompts]
    rows = []
    answers = generate_answers(encoded, model, tokenizer, args, runtime)
    for prompt, (answer, stopped) in zip(prompts, answers, strict=True):
        answer = re.sub(r"^ (?=\S)", "", answer.strip("\n").rstrip())  # indentation stays
        rows.append({"prompt": prompt, "answer": answer, "stopped": stopped})
    for row in rows[: len(args.prompt)]:
        end = "" if row["stopped"] else " [...]"
        table.info("Prompt: %s\nAnswer: %s%s", row["prompt"], row["answer"], end)
    if args.prompts_file:
        path = Path(args.prompts_file).with_suffix(".answers.jsonl")
        write_rows(path, rows[len(args.prompt) :])
        table.info("Answers written to %s", path)
    if args.chat:
        chat(args, runtime, model, tokenizer)


def read_prompts(args: argparse.Namespace) -> list[Any]:
    """Each --prompt, and the rows of fields, or else the lines, of --prompts_file."""
    path, read = args.prompts_file, []
    if not path:
        return args.prompt
    try:
        if data_pipeline.file_kind(path)[0]:
            columns = data_pipeline.format_columns(args.text_format)
            rows = data_pipeline.read_records(path, columns)
            read = [Text(row) if isinstance(row, str) else row for row in rows]
        else:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
            read = list(filter(str.strip, lines))
        for row, prompt in enumerate(read, 1):
            fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
            if not isinstance(fields, dict):
                raise ValueError(f"row {row}: {prompt!r:.40} is neither a text nor fields")
            for text in (*fields, *fields.values()):
                data_pipeline.check_text(str(text), f"row {row}")
        if not read:
            raise ValueError("holds no prompts")
    except Exception as error:  # of the libraries that read files
        raise ValueError(f"--prompts_file {path}: {error}") from None
    return [*args.prompt, *read]


class ScreenStreamer(TextStreamer):
    """Shows an answer as it is written, and keeps its text."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(for_terminal(text), end="\n" if stream_end else "", flush=True)


def chat(
    args: argparse.Namespace, runtime: Runtime, model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    """Answers what is typed. In the format of turns the model reads the whole conversation, or as
    much of its end as leaves room for an answer; in all others each question alone."""
    with suppress(ImportError):  # Windows has none
        importlib.import_module("readline")  # arrow keys
    turns: list[dict[str, str]] = []
    room = model.config.n_positions - prefix_length(model) - args.max_new_tokens
    table.info("Ctrl-C ends an answer, Ctrl-D the chat")
    while True:
        streamer = ScreenStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            prompt: Any = input("> ")
            turns.append({"role": "user", "content": prompt})
            if args.text_format == "messages":
                prompt, encode = {"messages": turns}, data_pipeline.encode_prompt
                while len(turns) > 1 and len(encode(prompt, "messages", tokenizer)) > room:
                    del turns[:2]
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
        after = [i for i in range(start, len(ids)) if labels[i] == IGNORED]
        reference = ids[start : after[0] if after else None]  # of several answers, the first
        if reference[-1:] == [tokenizer.eos_token_id]:
            reference.pop()
        prompts.append(ids[:start])
        references.append(reference)
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
    words = (
        "Held-out answers: chrF {eval_chrf:.1f}, BLEU {eval_bleu:.1f}, {eval_stopped:.0%} stop by "
        "themselves, {eval_answer_length:.0f} tokens (references {eval_reference_length:.0f})"
    )
    return words.format(**scores)


# ---- the machine it runs on ----------------------------------------------------------------------


@dataclass
class Runtime:
    """The device, the arithmetic and this process's place among the others."""

    device: torch.device
    dtype: torch.dtype  # of matrix products and frozen weights; trainable weights stay fp32
    rank: int = 0
    world_size: int = 1

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
    line = next(iter(found.stdout.strip().splitlines()), "")
    if found.returncode or not line:
        return f"nvidia-smi says: {line or found.stderr.strip() or found.returncode}"
    gpu, _, driver = line.rpartition(", ")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    way_out = "install the build that fits the driver (README, Start)"
    return f"{gpu}, driver {driver}: this PyTorch is {built} and cannot use it; {way_out}"


def choose_device(wanted: str, processes: int) -> torch.device:
    """--device, this process's own GPU under torchrun. Raises ValueError for one not there."""
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True,
    }  # fmt: skip
    name = next(n for n in available if available[n]) if wanted == "auto" else wanted
    reason = unusable_gpu() if wanted in ("auto", "cuda") and not available["cuda"] else ""
    if not available[name]:
        why = reason or "PyTorch finds none here"
        raise ValueError(f"--device {name}: {why}; auto takes what there is")
    if reason:
        logger.warning("Training on the %s, not on the GPU: %s", name, reason)
    if processes > 1 and name == "mps":
        raise ValueError("--device mps: a Mac's GPU takes one process; torchrun with --device cpu")
    if name != "cuda":
        return torch.device(name)
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"--device cuda: {gpus} GPUs here; torchrun with --nproc_per_node={gpus}")
    return torch.device("cuda", local_rank)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """--precision as a dtype. Raises ValueError for one that the device does not have."""
    able = {"bf16": bf16_in_hardware(device), "fp16": device.type == "cuda", "fp32": True}
    if precision == "auto":
        precision = next(name for name in able if able[name])
    if not able[precision]:
        lacks = f"this {device.type} does not have it; auto takes what there is"
        raise ValueError(f"--precision {precision}: {lacks}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def choose_runtime(args: argparse.Namespace) -> Runtime:
    """Where and how the run computes; joins the other processes under torchrun. Raises ValueError
    for a device or precision that is not there."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device, world_size)
    dtype, cuda = choose_dtype(args.precision, device), device.type == "cuda"
    return_freed_memory()
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is still fp32
        # Where PyTorch prefers cuDNN's attention, as on an H100, each new width is planned anew.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world_size > 1 and not dist.is_initialized():
        # The others wait while process 0 answers prompts, writes and hashes: for hours at most,
        # not NCCL's ten minutes. One that fails ends them all at once, see `main`.
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=timedelta(hours=3),
            device_id=device if cuda else None,
        )  # fmt: skip
    return Runtime(device, dtype, int(os.environ.get("RANK", 0)), world_size)


def return_freed_memory() -> None:
    """Has glibc hand blocks of 16 MB and more back to the system as soon as they are freed.

    Its own limit rises to 32 MB, and below it blocks of ever other sizes leave holes in the heap:
    full fine-tuning of a GPT-2 of 16 million parameters grew by 22 MB a step.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**24)  # M_MMAP_THRESHOLD


@contextmanager
def one_first(runtime: Runtime) -> Iterator[None]:
    """One process of each machine goes ahead, and the others find what it has downloaded."""
    ahead = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if runtime.world_size > 1 and not ahead:
        dist.barrier()
    yield
    if runtime.world_size > 1 and ahead:
        dist.barrier()


SPEAKERS = {"root", __name__, "table", "data_pipeline", "modify_llm"}
EMOJI = re.compile("[🔧📊🔢] ?")


class LogHandler(logging.Handler):
    """Lines on stdout, past a progress bar on stderr, and in the run's log file, or kept for it
    until it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.file: TextIO = io.StringIO()

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.name == table.name else f"{record.levelname}:{record.name}:"
        return prefix + record.getMessage()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and record.name not in SPEAKERS:
            return  # an HTTP client's lines
        line = self.format(record)
        with suppress(OSError):  # on a full disk, what fails next tells it in one line
            print(line, file=self.file, flush=True)
        try:
            tqdm.write(for_terminal(line), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # `train_llm.py | head`: the run goes on, its log file tells the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def for_terminal(line: str) -> str:
    """The line as stdout's encoding can show it: emoji left out, other characters escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        line.encode(encoding)
        return line
    except UnicodeEncodeError:
        return EMOJI.sub("", line).encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def logging_to_screen(rank: int) -> Iterator[None]:
    """Process 0 alone speaks. Afterwards logging is the caller's again."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    root, bars = logging.getLogger(), is_progress_bar_enabled()
    before = root.handlers[:], root.level
    root.handlers = [LogHandler() if rank == 0 else logging.NullHandler()]
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
def log_file(path: Path) -> Iterator[None]:
    """Directs to a file what is logged, and what was since the start or the file before."""
    handler = next((h for h in logging.getLogger().handlers if isinstance(h, LogHandler)), None)
    if handler is None:  # inside another program, whose logging this is
        yield
        return
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


# ---- flags ---------------------------------------------------------------------------------------


above_zero = number(float, sys.float_info.min)


def temperature(text: str) -> float:
    """A flag's type: 0, or what logits can be divided by."""
    value = float(text)
    if not (value == 0 or 0.01 <= value <= 100):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 (greedy), or 0.01 to 100")
    return value


def trackers(text: str) -> list[str]:
    """A flag's type: trackers, separated by commas."""
    chosen, legal = [name for name in names(text) if name != "none"], "tensorboard, wandb, trackio"
    if unknown := [name for name in chosen if name not in names(legal)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected {legal}")
    return chosen


share = number(float, sys.float_info.min, math.nextafter(1, 2))
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
    "report_to": Flag([], trackers, "tensorboard, wandb, trackio; several with commas (none)"),
    "resume_from": Flag(None, nonempty, "auto, a run directory or a checkpoint (none: start)"),
    "overwrite_output_dir": Flag(False, bool, "remove the run that the directory holds"),
}
RUN_FLAGS = {
    "output_dir": Flag("./outputs", nonempty, "where the run is written"),
    "config": Flag(
        None, nonempty, "a run.json, JSON or YAML of flags; the command line stands above it (none)"
    ),
    "precision": Flag("auto", ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    "device": Flag("auto", ("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda or mps"),
    "demo": Flag(False, bool, "train a tiny GPT-2 on made-up tasks, then LoRA on it"),
}
USE_FLAGS = {
    "adapter_path": Flag(
        None, nonempty, "start from, evaluate or prompt a run, or its best/ or final/ (none)"
    ),
    "eval_only": Flag(False, bool, "evaluate on the held-out rows, train nothing"),
    "max_new_tokens": Flag(128, number(int, 1), "of an answer; >= 1"),
    "temperature": Flag(0.0, temperature, "of sampling, 0.01 to 100; 0: greedy"),
    "top_p": Flag(0.95, share, "sample from the likeliest tokens of this probability; > 0, <= 1"),
    "repetition_penalty": Flag(1.2, number(float, 1), "on an answer's own tokens; 1: off"),
    "no_repeat_ngram_size": Flag(0, number(int, 0), "no run of so many tokens twice; 0: off"),
    "num_beams": Flag(1, number(int, 1), "of beam search; 1: off"),
    "length_penalty": Flag(1.0, number(float, -100), "of beam search; > 0: longer answers"),
    "prompts_file": Flag(
        None, nonempty,
        "a prompt a line, or rows of fields (.jsonl, .json, .csv); answers go beside it, to "
        "NAME.answers.jsonl (none)",
    ),
    "chat": Flag(False, bool, "talk to the model; Ctrl-C ends an answer, Ctrl-D the chat"),
}  # fmt: skip
TRAINING_DATA_FLAGS = DATA_FLAGS | {
    "text_format": DATA_FLAGS["text_format"]._replace(default="alpaca"),
    "eval_fraction": DATA_FLAGS["eval_fraction"]._replace(default=0.05),
    "num_workers": DATA_FLAGS["num_workers"]._replace(default=0),
}
FLAGS = TRAINING_DATA_FLAGS | modify_llm.MODEL_FLAGS | OPTIMISATION_FLAGS | EVALUATION_FLAGS
FLAGS |= RUN_FLAGS | USE_FLAGS
PATH_FLAGS = {"dataset_path", "eval_dataset_path", "adapter_path", "model_name_or_path", "config"}
PATH_FLAGS |= {"tokenizer_name_or_path", "resume_from", "prompts_file"}
DEFAULTS = {name: flag.default for name, flag in FLAGS.items()} | {"prompt": []}
# What may differ between a run and its continuation; all else must be equal: it is the same run.
# Paths may, as the contents are compared; so may what cuts the same steps in another way.
FREE_TO_CHANGE = {*EVALUATION_FLAGS, *RUN_FLAGS, *USE_FLAGS, *PATH_FLAGS, "prompt", "num_workers"}
FREE_TO_CHANGE |= {"max_eval_samples", "epochs", "max_steps", "gradient_checkpointing", "compile"}
FREE_TO_CHANGE |= {"batch_size", "gradient_accumulation_steps"}


def utf8_text(value: str) -> str:
    """A flag's type: text without lone surrogates."""
    if data_pipeline.SURROGATES.search(value):
        raise argparse.ArgumentTypeError(f"{value!r}: not UTF-8")
    return value


def prompt_texts(value: object) -> list[str]:
    """One text, or a list of them. Raises ValueError."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt: {value!r}: expected a text, or a list of texts")
    return list(map(utf8_text, texts))


def build_parser() -> argparse.ArgumentParser:
    """All flags. None has its default here, so that what was parsed is what was given."""
    parser = argparse.ArgumentParser(
        prog="train_llm.py",
        description="Fine-tune GPT-2 on instruction rows.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(__doc__.splitlines()[2:7]),
    )
    add_flags(parser, "data", TRAINING_DATA_FLAGS)
    modify_llm.add_model_flags(parser)
    add_flags(parser, "optimisation", OPTIMISATION_FLAGS)
    add_flags(parser, "evaluation and saving", EVALUATION_FLAGS)
    add_flags(parser, "run", RUN_FLAGS)
    add_flags(parser, "using a model", USE_FLAGS)
    parser.add_argument_group("prompts").add_argument(
        "--prompt", action="append", default=argparse.SUPPRESS, type=utf8_text,
        help="answer it; repeatable (none)",
    )  # fmt: skip
    return parser


def nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """The flags given on the command line. A bad one ends the process with status 2."""
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        parser.error(f"{flag}: no such flag{nearest(flag, [f'--{name}' for name in DEFAULTS])}")
    return vars(given)


def read_config(path: Path) -> dict[str, Any]:
    """The flags in a run.json, or in a JSON or YAML file of flags. Raises ValueError."""
    flags: dict[str, Any] = {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        for name, value in content.get("settings", content).items():
            if name not in DEFAULTS:
                raise ValueError(f"{name}: no such flag{nearest(name, DEFAULTS)}")
            if value is not None:
                is_prompt = name == "prompt"
                flags |= {name: prompt_texts(value)} if is_prompt else parsed(FLAGS, {name: value})
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"--config {path}: line {line}: {error.problem}") from None
    except (OSError, yaml.YAMLError, AttributeError, RecursionError) as error:
        raise ValueError(f"--config {path}: {modify_llm.first_line(error)}") from None
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    of_one_start = {"config", "resume_from", "overwrite_output_dir"}
    return {name: flags[name] for name in flags.keys() - of_one_start}


def stored_flags(given: dict[str, Any]) -> dict[str, Any]:
    """What stands below the command line: the flags of --config, and below these those of the run
    that --resume_from continues. Raises ValueError."""
    config = read_config(Path(given["config"])) if "config" in given else {}
    stored: dict[str, Any] = {}
    if "resume_from" in given:
        run_dir = resumed_directory(argparse.Namespace(**DEFAULTS | config | given))
        if given["resume_from"] != "auto" and not os.path.isdir(run_dir):
            raise ValueError(f"--resume_from {given['resume_from']}: no such directory")
        with suppress(ValueError):  # without one, the checkpoint's own settings are compared
            stored = read_config(run_dir / "run.json")
        stored["output_dir"] = str(run_dir)
        if "epochs" in given | config:
            stored.pop("max_steps", None)  # it would stand above them
    return stored | config


def resumed_directory(args: argparse.Namespace) -> Path:
    """The directory of the run that --resume_from continues."""
    if checkpoint := named_checkpoint(args):
        return checkpoint.parent.parent
    path = Path(args.output_dir if args.resume_from == "auto" else args.resume_from)
    return path.parent if path.name == "checkpoints" else path


def named_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume_from names, itself or as the target of a link; None: a run."""
    path = Path(os.path.abspath(args.resume_from))
    names = (path, path.resolve())
    return next((name for name in names if re.fullmatch(r"step_\d+", name.name)), None)


def resolve(given: dict[str, Any]) -> argparse.Namespace:
    """All flags: those given, the others at their defaults. Raises ValueError where they conflict.

    With --adapter_path, what it was trained with are the defaults of the model's and text's flags.
    """
    defaults, adapter_path = dict(DEFAULTS), given.get("adapter_path")
    if adapter_path:
        adapter_path = str(modify_llm.result_directory(adapter_path))
        given = given | {"adapter_path": adapter_path}
        saved: dict[str, Any] = {}
        with suppress(ValueError):  # load_trained tells
            saved = trained_settings(Path(adapter_path))
        known = {*modify_llm.MODEL_FLAGS, "text_format", "max_length"}
        defaults |= {name: value for name, value in saved.items() if name in known}
        defaults["model_name_or_path"] = None
        for name in given.keys() & saved.keys() & modify_llm.MODEL_FLAGS.keys():
            if given[name] != saved[name]:
                raise ValueError(f"--{name}: {adapter_path} was trained with {saved[name]}")
    args = argparse.Namespace(**defaults | given)
    modify_llm.check_together(args)
    if problem := conflict(args):
        raise ValueError(problem)
    if args.learning_rate is None:
        args.learning_rate = TECHNIQUES[args.modification_type].learning_rate(args)
    return args


def uses_only(args: argparse.Namespace) -> bool:
    """Whether a model is evaluated or prompted, and nothing is trained."""
    asked = args.prompt or args.prompts_file or args.chat
    return args.eval_only or bool(asked and not args.dataset_path)


def conflict(args: argparse.Namespace) -> str:
    """The first conflict between several flags; "" where there is none."""
    has_rows = args.dataset_path or args.eval_dataset_path
    no_task = not (args.dataset_path or args.demo or uses_only(args))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    missing = ", ".join(name for name in args.report_to if not importlib.util.find_spec(name))
    prefix_dropped = args.gradient_checkpointing and args.modification_type == "prefix"
    ends_above = args.learning_rate is not None and args.min_lr > args.learning_rate
    conflicts = {
        "--gradient_checkpointing: drops the cache that carries a prefix": prefix_dropped,
        "--eval_only: needs --eval_dataset_path, or --dataset_path to hold rows out of":
            args.eval_only and not has_rows,
        "--dataset_path: needed to train (or --demo)": no_task,
        f"--min_lr {args.min_lr}: above --learning_rate {args.learning_rate}": ends_above,
        f"--prompts_file {args.prompts_file}: no such file":
            args.prompts_file and not Path(args.prompts_file).is_file(),
        f"--prompts_file {args.prompts_file}: its directory cannot be written to":
            args.prompts_file and not os.access(Path(args.prompts_file).resolve().parent, os.W_OK),
        "--chat: with --adapter_path, after training": args.chat and not uses_only(args),
        "--num_beams: neither draws (--temperature) nor streams (--chat)":
            args.num_beams > 1 and (args.temperature or args.chat),
        "--eval_answers: needs the package: pip install sacrebleu":
            args.eval_answers and not importlib.util.find_spec("sacrebleu"),
        "--from_scratch: --adapter_path brings the base that it was trained on":
            args.adapter_path and args.from_scratch,
        "--demo: starts anew, without --resume_from, --adapter_path and torchrun":
            args.demo and (args.resume_from or args.adapter_path or processes > 1),
        f"--report_to {missing}: needs the package: pip install {missing}": missing,
        "--overwrite_output_dir: would remove the run that --resume_from continues":
            args.resume_from and args.overwrite_output_dir,
    }  # fmt: skip
    return next((message for message, holds in conflicts.items() if holds), "")


def idle_flags(given: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """A line for each flag that was given and changes nothing."""
    idle: dict[str, str] = {}
    if args.demo:
        used = {"demo", "output_dir", "overwrite_output_dir", "device", "precision", "seed"}
        idle = dict.fromkeys(DEFAULTS.keys() - used, ", --demo has its own")
    elif uses_only(args):
        unused = {*OPTIMISATION_FLAGS, *EVALUATION_FLAGS}
        unused |= set() if args.adapter_path else {"modification_type"}
        if args.eval_only:
            unused -= {"eval_answers"}
        else:
            unused |= {"eval_dataset_path", "eval_fraction", "batch_size"}
        idle = dict.fromkeys(unused, ", nothing is trained")
    elif args.scheduler == "cosine":
        idle["warmup_steps"] = ", --scheduler cosine has no warm-up"
    elif args.scheduler == "constant":
        idle["min_lr"] = ", --scheduler constant does not decay"
    if not args.temperature:
        idle["top_p"] = ", --temperature 0 takes the likeliest token"
    if args.num_beams == 1:
        idle["length_penalty"] = ", it is for --num_beams"
    if args.modification_type != "lora":
        idle["lora_plus_ratio"] = ", only lora has a B"
    if args.eval_dataset_path:
        idle["eval_fraction"] = " beside --eval_dataset_path"
    lines = [f"--{name}: without effect{idle[name]}" for name in sorted(idle.keys() & given.keys())]
    return lines + ([] if args.adapter_path or args.demo else modify_llm.idle_flags(given, args))


# ---- the script ----------------------------------------------------------------------------------


DEMO_FILES = data_pipeline.BUNDLED_SAMPLE.parent
DEMO_FORMAT = "{input}\n{instruction}|| {output}"
DEMO_BASE = {
    "dataset_path": str(DEMO_FILES / "demo_base.json"), "from_scratch": True, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "modification_type": "full", "epochs": 6, "learning_rate": 3e-3, "batch_size": 16,
    "num_samples": 0, "eval_interval": 429,
}  # fmt: skip
DEMO_LORA = {
    "dataset_path": str(DEMO_FILES / "demo_tasks.json"),
    "eval_dataset_path": str(DEMO_FILES / "demo_questions.json"),
    "lora_rank": 8, "lora_alpha": 16, "epochs": 10, "learning_rate": 1e-2, "batch_size": 32,
    "num_samples": 1, "eval_interval": 125,
}  # fmt: skip


def use_model(args: argparse.Namespace, runtime: Runtime) -> None:
    """--eval_only and --prompt without training: what --adapter_path holds, or the plain base."""
    tokenizer = tokenizer_for(args)
    torch.manual_seed(args.seed)
    if args.adapter_path:
        model = load_trained(args.adapter_path, args.model_name_or_path)
    else:
        model = modify_llm.load_base(args).requires_grad_(False)
    prepare_model(model, args, runtime)  # at the precision that it was trained and evaluated with
    model.requires_grad_(False)
    check_fits(model, tokenizer, args.max_length if args.eval_only else 1)
    if args.eval_only:
        _, rows = load_rows(args, tokenizer)
        loader = make_loader(rows, args, runtime, tokenizer, shuffle=False)
        loss, tokens, accuracy = evaluate(SummedLoss(model), loader, runtime)
        line = "Held-out loss: %.4f | Held-out PPL: %.2f | %s tokens of %s rows, %.1f%% right"
        values = (loss, perplexity(loss), f"{tokens:,}", f"{len(rows):,}", 100 * accuracy)
        table.info(line, *values)
        if args.eval_answers and runtime.rank == 0:
            prompts, references = held_out_prompts(rows, args.eval_answers, tokenizer)
            answers = generate_answers(prompts, model, tokenizer, args, runtime)
            table.info(scores_line(score_answers(answers, references, tokenizer)))
    answer_prompts(args, runtime, model, tokenizer)


def demo(args: argparse.Namespace, runtime: Runtime) -> None:
    """A tiny GPT-2 from scratch on small tasks, then LoRA, which teaches it new names for them; at
    the end, how many held-out questions each answers rightly."""
    output_dir = Path("./outputs/demo" if args.output_dir == "./outputs" else args.output_dir)
    args.output_dir, args.from_scratch = str(output_dir), True  # base/ is its own to write, too
    with suppress(ValueError, KeyError, TypeError):  # an earlier demo is the demo's to overwrite
        settings = modify_llm.read_json(output_dir / "run.json")["settings"]
        args.overwrite_output_dir |= settings["demo"]
    user = {name: getattr(args, name) for name in ("device", "precision", "seed")}
    common = user | {
        "demo": True, "max_length": 64, "text_format": DEMO_FORMAT, "max_new_tokens": 8,
        "repetition_penalty": 1.0,
    }  # fmt: skip
    with ExitStack() as closing:
        claim_directory(args, runtime, closing)
        scratch = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        if args.overwrite_output_dir:
            clear_directory(output_dir)
        # Threads would meet after each small product, and on a busy machine wait there for minutes.
        closing.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        table.info("Demo, part 1 of 2: a tiny GPT-2 learns tasks by name, from random weights\n")
        train_model(resolve(common | DEMO_BASE | {"output_dir": str(scratch / "run")}), runtime)
        shutil.move(scratch / "run" / "best", output_dir / "base")
        table.info("\nDemo, part 2 of 2: LoRA teaches it other names for them\n")
        base = {"model_name_or_path": str(output_dir / "base"), "output_dir": str(output_dir)}
        lora = resolve(common | DEMO_LORA | base)
        train_model(lora, runtime)
        show_demo_answers(lora, runtime)


def show_demo_answers(args: argparse.Namespace, runtime: Runtime) -> None:
    """Five held-out questions with their answers, and how many of all are answered rightly."""
    rows = json.loads(Path(args.eval_dataset_path).read_text(encoding="utf-8"))
    tokenizer, answers = tokenizer_for(args), {}
    models = {"base": modify_llm.load_base(args), "tuned": load_trained(f"{args.output_dir}/final")}
    for name, model in models.items():
        prepare_model(model.requires_grad_(False), args, runtime)
        prompts = [data_pipeline.encode_prompt(row, args.text_format, tokenizer) for row in rows]
        found = generate_answers(prompts, model, tokenizer, args, runtime)
        answers[name] = [answer.strip() for answer, _ in found]
    table.info("\nHeld-out questions, on lists of words that are in neither part's rows:\n")
    columns = "%-36s %-24s %-24s %s"
    table.info(columns, "question", "base", "tuned", "right answer")
    for row, base, tuned in list(zip(rows, answers["base"], answers["tuned"], strict=True))[:5]:
        question = f"{row['input']}: {row['instruction']}"
        table.info(columns, question, base, tuned, row["output"])
    references = [row["output"] for row in rows]
    right = [sum(map(str.__eq__, answers[name], references)) for name in models]
    table.info("\nRight answers of %d: base %d, tuned %d", len(rows), *right)
    table.info("The model is tiny, the tasks are made up of some 60 words, and it knows no others.")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; what goes wrong is told in one line on stderr.

    In another program, KeyboardInterrupt is raised: it is not for this function to swallow.
    """
    parser = build_parser()
    given = parse_flags(parser, argv)
    try:
        args = resolve(stored_flags(given) | given)
    except ValueError as error:
        parser.error(in_one_line(error, given))
    rank, status = int(os.environ.get("RANK", 0)), 1
    with logging_to_screen(rank):
        for line in idle_flags(given, args):
            logger.warning(line)
        try:
            work = demo if args.demo else use_model if uses_only(args) else train_model
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
    reason = modify_llm.first_line(error)
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
    sys.exit(main())
