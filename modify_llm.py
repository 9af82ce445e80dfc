"""Hand-written LoRA, bottleneck adapters, prefix tuning, selective freezing and full fine-tuning.

    python modify_llm.py --modification_type lora
    python modify_llm.py --compare --model_name_or_path gpt2-xl
    python modify_llm.py --adapter_path outputs/best --merge_to merged/

From a notebook: `model = apply_lora(GPT2LMHeadModel.from_pretrained("gpt2"), rank=8, alpha=16)`,
then train as usual.

Each technique stands in a section of its own: a module, an `apply_` function that puts it into a
model, and, where it is saved in a format of others, how it is saved and loaded. The table
TECHNIQUES below them holds all that the scripts know of a technique.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import sys
from argparse import (
    SUPPRESS,
    ArgumentError,
    ArgumentParser,
    Namespace,
    RawDescriptionHelpFormatter,
)  # fmt: skip
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import regex
import torch
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from pandas import DataFrame
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)
Settings, Tensors = dict[str, Any], dict[str, Tensor]


# ---- LoRA and DoRA -------------------------------------------------------------------------------


class LoRALayer(nn.Module):
    """h = W0 x + (alpha / r) B A x, where only A and B train (Hu et al., 2021, equation 3).

    A, `lora_A` (r, in_features), starts as in loralib (Kaiming uniform, a = sqrt(5)), and B,
    `lora_B` (out_features, r), at zero, so that B A = 0 when training starts. `thirds`, such as
    "qv", adapts single parts of GPT-2's fused query-key-value projection: each has an A and a B of
    its own, stacked in n x r rows of `lora_A` and n x (out_features / 3) rows of `lora_B`.
    `rslora` scales by alpha / sqrt(r) (Kalajdzievski, 2023).

    `dora`: W = m (W0 + s B A) / ||W0 + s B A||, by the norm of each output's weights, where the
    magnitudes m, `lora_magnitude_vector` (out_features,), train from ||W0|| on (Liu et al., 2024,
    equation 5; an output's weights are a column there, as its code and PEFT have it); for gradients
    the norm is a constant (section 4.3).
    """

    def __init__(
        self, original_layer: Conv1D | nn.Linear, rank: int, alpha: float, dropout: float = 0.0,
        thirds: str = "", rslora: bool = False, dora: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.original_layer, self.dropout = original_layer, nn.Dropout(dropout)
        self.thirds, self.rslora = thirds, rslora
        self.scaling = alpha / scaling_divisor(rank, rslora)
        (out_features, in_features), parts = self.original_weight().shape, len(thirds) or 1
        rows, device = out_features, original_layer.weight.device
        if thirds:
            rows = parts * out_features // 3
        self.lora_A = nn.Parameter(torch.empty(parts * rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.merged: Tensor | None = None  # W0, while the original layer holds the merged weight
        self.lora_magnitude_vector = nn.Parameter(self.weight_norms()) if dora else None

    def full_B(self) -> Tensor:
        """(out_features, rows of A): B, or each third's B in its own block, zeros elsewhere."""
        if not self.thirds:
            return self.lora_B
        n = len(self.thirds)
        rows = torch.block_diag(*self.lora_B.chunk(n)).chunk(n)  # each (out_features / 3, n x r)
        adapted = dict(zip(self.thirds, rows, strict=True))
        return torch.cat([adapted.get(third, torch.zeros_like(rows[0])) for third in "qkv"])

    def forward(self, x: Tensor) -> Tensor:
        original, magnitude = self.original_layer, self.lora_magnitude_vector
        if self.merged is not None:
            return original(x)
        plain = magnitude is None and not (self.training and self.dropout.p)
        if plain and not any(parameter.requires_grad for parameter in original.parameters()):
            W, B = self.original_weight().t(), self.full_B()
            return LoRAProduct.apply(x, W, original.bias, self.lora_A, B, self.scaling)
        h, x = original(x), self.dropout(x)
        # A and B stay in fp32 beside a base in bf16, also without autocast.
        low_rank = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (..., r)
        update = self.scaling * F.linear(low_rank, self.full_B())
        if magnitude is not None:  # W x = W0 x + (m / norm) s B A x + (m / norm - 1) W0 x
            ratio = magnitude / self.weight_norms()  # (out,)
            update = ratio * update + (ratio - 1) * F.linear(x, self.original_weight().to(x.dtype))
        return h + update.to(h.dtype)

    def original_weight(self) -> Tensor:
        """W0 (out_features, in_features): Conv1D's lies the other way."""
        weight = self.original_layer.weight
        return weight.t() if isinstance(self.original_layer, Conv1D) else weight

    def low_rank_update(self) -> Tensor:
        """s B A (out_features, in_features) in fp32"""
        return self.full_B().float() @ self.lora_A.float() * self.scaling

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """||W0 + s B A|| (out_features,)"""
        return torch.linalg.vector_norm(self.original_weight() + self.low_rank_update(), dim=1)

    @property
    def weight(self) -> Tensor:
        """W0 + (alpha / r) B A: for a loss that multiplies by the head's weight itself."""
        if self.training and self.dropout.p:
            raise ValueError(
                "--lora_dropout: acts on a layer's input, here its weight alone counts"
            )
        weight = self.original_layer.weight
        return weight if self.merged is not None else weight + self.get_delta_weight()

    def get_delta_weight(self) -> Tensor:
        """W - W0 in fp32, laid out as the original weight: Conv1D's is transposed."""
        delta = self.low_rank_update()
        if self.lora_magnitude_vector is not None:
            ratio, W0 = self.lora_magnitude_vector / self.weight_norms(), self.original_weight()
            delta = ratio[:, None] * (W0 + delta) - W0
        return delta.t() if isinstance(self.original_layer, Conv1D) else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into the original weight: inference costs nothing more (section 4.1)."""
        if self.merged is not None:
            raise RuntimeError("merged already: merging twice would add the update twice")
        weight = self.original_layer.weight
        merged = weight + self.get_delta_weight()
        self.merged, weight.data = weight.data, merged.to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the update out of the original weight again."""
        if self.merged is None:
            raise RuntimeError("not merged: there is no update to take out")
        self.original_layer.weight.data, self.merged = self.merged, None


def scaling_divisor(rank: int, rslora: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if rslora else rank


def apply_lora(
    model: GPT2LMHeadModel, rank: int = 4, alpha: float = 8.0, *, dropout: float = 0.0,
    target_modules: Iterable[str] = ("c_attn", "c_proj", "c_fc"),
    layers: Iterable[int] | None = None, scaling: str = "standard", dora: bool = False,
    trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Wraps every Conv1D or Linear layer that a target names in a LoRALayer; freezes all else.

    target_modules: suffixes of layer names. The paper adapts the query and value projections alone
    (section 5.1): ("c_attn.q", "c_attn.v"). layers: numbers of the blocks (None: all). scaling:
    "standard" or "rank_stabilized". In place. Raises ValueError for a target that matches nothing,
    or no layer of these types.
    """
    settings = checked("lora", locals())
    matched = match_targets(model, settings["lora_target_modules"], settings["lora_layers"])
    if dora and (parts := [name for name, thirds in matched.items() if thirds]):
        raise ValueError(f"--lora_dora: needs whole layers, of {parts[0]} a target names thirds")
    start_modification(model, settings, matched)
    rslora = scaling == "rank_stabilized"
    for name, thirds in matched.items():
        original = model.get_submodule(name)
        layer = LoRALayer(original, rank, alpha, dropout, thirds, rslora, dora)
        model.set_submodule(name, layer)
    return model


def match_targets(
    model: GPT2LMHeadModel, targets: Iterable[str], blocks: Iterable[int] | None
) -> dict[str, str]:
    """{layer name: its adapted thirds, "" for the whole layer}, of these blocks alone (None: all).
    Logs how many layers a target names."""
    matched: dict[str, str] = {}
    check_blocks(model, "lora_layers", blocks or ())
    inside = tuple(f"transformer.h.{block}." for block in blocks or ())
    for target in targets:
        where = f"--lora_target_modules {target}"
        third = re.fullmatch(r"((?:.*\.)?c_attn)\.([qkv])", target)
        suffix, part = third.groups() if third else (target, "")
        found = modules_named(model, suffix, "lora_target_modules")
        found = {n: m for n, m in found.items() if blocks is None or n.startswith(inside)}
        for name, module in found.items():
            # bitsandbytes' 8-bit layers are Linear, too
            if not (isinstance(module, Conv1D | nn.Linear) and module.weight.is_floating_point()):
                kind = type(module).__name__
                raise ValueError(f"{where}: {name} is a {kind}; LoRA wraps Conv1D and Linear")
            if module is model.lm_head and is_tied(model):
                raise ValueError(f"{where}: shares its weight with the token embeddings")
            if part and "crossattention" in name:
                raise ValueError(f"{where}: {name} holds keys and values alone, no three thirds")
            if name in matched and (not part or not matched[name] or part in matched[name]):
                raise ValueError(f"{where}: {name} is matched by another target too")
            matched[name] = "".join(sorted(matched.get(name, "") + part, key="qkv".index))
        if len(found) > 1:
            logger.info("LoRA target %s: %d layers", target, len(found))
    if not matched:
        raise ValueError("--lora_target_modules: names no layer, or none of --lora_layers")
    return matched


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


class LoRAProduct(torch.autograd.Function):
    """x W + b + s (x A^T) B^T with W (in, out) and b frozen, for a LoRALayer without dropout.

    The plain version, to which a test holds it equal:

        torch.addmm(b, x, W) + s * (x @ A.T) @ B.T

    Here the update is added in place, forward and backward, and the products of rank r are ordered
    so that nothing larger than what goes in or comes out is made.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        shape, dtype, grad_dtype = x.shape, autocast_dtype(x.device) or x.dtype, A.dtype
        x = x.reshape(-1, shape[-1])  # (tokens, in)
        x, W, A, B = (tensor.to(dtype) for tensor in (x, W, A, B))
        h = x @ W if b is None else torch.addmm(b.to(dtype), x, W)  # (tokens, out)
        low_rank = (x @ A.t()).mul_(scaling)  # (tokens, r)
        h.addmm_(low_rank, B.t())
        ctx.save_for_backward(x, W, A, B, low_rank)
        ctx.scaling, ctx.grad_dtype = scaling, grad_dtype
        return h.view(*shape[:-1], h.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, low_rank = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        low_rank_grad = (grad @ B).mul_(ctx.scaling)  # (tokens, r)
        A_grad = (low_rank_grad.t() @ x).to(ctx.grad_dtype)  # (r, in)
        # Contiguous, as AdamW keeps it: otherwise it would be copied once more.
        B_grad = (low_rank.t() @ grad).t()  # (out, r)
        B_grad = B_grad.to(ctx.grad_dtype, memory_format=torch.contiguous_format)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ W.t()).addmm_(low_rank_grad, A).view(*shape[:-1], x.shape[-1])
        return x_grad, None, None, A_grad, B_grad, None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast brings products to on a device; None outside of autocast."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


# ---- IA3, biases, LayerNorms ---------------------------------------------------------------------


class IA3Layer(nn.Module):
    """h = l * (x W + b) or, where a feed-forward sub-layer ends, h = (l * x) W + b: only l trains,
    `ia3_l`, from ones on (Liu et al., 2022, section 3.3).

    The paper scales keys, values and what the feed-forward activation gives. GPT-2's `c_attn` makes
    queries too, and as in PEFT they are scaled as well. That adds nothing which the keys' l could
    not do alone, since scores take the product of the two, feature by feature.
    """

    def __init__(self, original_layer: Conv1D, feedforward: bool) -> None:
        super().__init__()
        self.original_layer, self.feedforward = original_layer, feedforward
        weight = original_layer.weight  # (in, out)
        scaled = weight.shape[0 if feedforward else 1]
        self.ia3_l = nn.Parameter(torch.ones(scaled, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if self.feedforward:
            return self.original_layer(x * self.ia3_l.to(x.dtype))
        h = self.original_layer(x)
        return h * self.ia3_l.to(h.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Folds l into the weight (in, out) and, with what comes out, into the bias."""
        weight, bias = self.original_layer.weight, self.original_layer.bias
        scale = self.ia3_l[:, None] if self.feedforward else self.ia3_l
        weight.data = (weight * scale).to(weight.dtype)
        if not self.feedforward:
            bias.data = (bias * scale).to(bias.dtype)


def apply_ia3(model: GPT2LMHeadModel, trainable_modules: Iterable[str] = ()) -> GPT2LMHeadModel:
    """Scales what every `c_attn` gives and every feed-forward `c_proj` takes by learned vectors;
    freezes all else. In place."""
    settings = checked("ia3", locals())
    scaled = modules_named(model, "c_attn", "modification_type")
    feedforward = modules_named(model, "mlp.c_proj", "modification_type")
    start_modification(model, settings, scaled | feedforward)
    for name, layer in (scaled | feedforward).items():
        model.set_submodule(name, IA3Layer(layer, name in feedforward))
    return model


def apply_bitfit(model: GPT2LMHeadModel, trainable_modules: Iterable[str] = ()) -> GPT2LMHeadModel:
    """Trains the biases alone (Ben Zaken et al., 2022). In place."""
    start_modification(model, checked("bitfit", locals()))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_(True)
    return model


def apply_layernorm_tuning(
    model: GPT2LMHeadModel, trainable_modules: Iterable[str] = ()
) -> GPT2LMHeadModel:
    """Trains the LayerNorms alone (Zhao et al., 2023). In place."""
    start_modification(model, checked("layernorm", locals()))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    return model


# ---- bottleneck adapters -------------------------------------------------------------------------

ACTIVATIONS = {"relu": F.relu, "gelu": partial(F.gelu, approximate="tanh"), "silu": F.silu}


class BottleneckAdapter(nn.Module):
    """h <- h + W_up f(W_down h), a bottleneck with a skip connection (Houlsby et al., 2019, 2.1).

    W_up starts at zero, so that the modified model starts as the original, exactly. The papers ask
    for a start near that: Houlsby's code draws both matrices from a truncated normal of standard
    deviation 1e-3, the adapters library from a normal of 0.02, as W_down here.
    """

    def __init__(
        self, hidden_size: int, adapter_size: int, activation: str, device: torch.device
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.down_proj = nn.Linear(hidden_size, adapter_size, device=device)
        self.up_proj = nn.Linear(adapter_size, hidden_size, device=device)
        nn.init.normal_(self.down_proj.weight, std=0.02)
        for parameter in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor) -> Tensor:  # (batch, length, hidden)
        down, up = self.down_proj, self.up_proj
        # fp32 weights work in the base's precision, also without autocast.
        bottleneck = F.linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype))
        bottleneck = self.activation(bottleneck)  # (batch, length, adapter size)
        return h + F.linear(bottleneck, up.weight.to(h.dtype), up.bias.to(h.dtype))


def run_adapter(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A forward hook: the module's adapter takes its output."""
    return module.adapter(output)


def apply_adapters(
    model: GPT2LMHeadModel, adapter_size: int = 64, *, placement: str = "pfeiffer",
    activation: str | None = None, trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Puts bottleneck adapters into every block, in place, and freezes all else.

    placement: "houlsby" has one at the end of each sub-layer, before the residual is added (Houlsby
    et al., 2019, figure 2); in GPT-2 a dropout stands there, whose output the adapter takes.
    "pfeiffer" has one a block, which takes the feed-forward output with the residual added
    (Pfeiffer et al., 2020, AdapterFusion, appendix A.2 and figure 5): here the block's output.
    activation: by default that of the published code, GELU for Houlsby's and ReLU for Pfeiffer's.
    Houlsby's runs train the LayerNorms too: trainable_modules=("ln_1", "ln_2", "ln_f").
    """
    activation = activation or ("gelu" if placement == "houlsby" else "relu")
    start_modification(model, checked("adapter", locals()))
    for block in model.transformer.h:
        houlsby = [block.attn.resid_dropout, block.mlp.dropout]
        for module in houlsby if placement == "houlsby" else [block]:
            module.adapter = BottleneckAdapter(
                model.config.n_embd, adapter_size, activation, block.ln_1.weight.device
            )
            module.adapter.hook = module.register_forward_hook(run_adapter)
    return model


# ---- prefix tuning -------------------------------------------------------------------------------
# Both kinds of prefix end as keys and values before those of the text, in every layer: one cache.


class PromptEmbedding(nn.Module):
    """Virtual tokens at the model's input, trained as embeddings (Lester et al., 2021, 2)."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)  # (prefix length, hidden)

    def prompt_embeddings(self) -> Tensor:
        return self.embedding

    def keys_and_values(
        self, transformer: GPT2Model, dtype: torch.dtype
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Key and value a layer, each (1, heads, prefix length, head size), by one pass of the
        prefix alone.

        Attention is causal: the prefix sees no text, so its states are the same for every row.
        """
        cache = DynamicCache()
        virtual = self.embedding[None]  # (1, prefix length, hidden)
        # Autocast casts what enters products, not LayerNorms.
        autocast = autocast_dtype(virtual.device)
        virtual = virtual.to(transformer.h[0].ln_1.weight.dtype if autocast else dtype)
        # `forward` itself, since calling the module would put the prefix before the prefix.
        transformer.forward(inputs_embeds=virtual, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]


class KeyValuePrefix(nn.Module):
    """Virtual tokens as keys and values of every layer (Li & Liang, 2021, section 4.2).

    Columns: key of layer 0, value of layer 0, key of layer 1, ..., each with its heads side by
    side. With a projection, P = MLP(P') (section 4.3); that the MLP is embedding (prefix length,
    hidden) -> tanh -> all columns stands in the authors' code alone.
    """

    def __init__(self, columns: Tensor, tokens: Tensor, projection_size: int = 0) -> None:
        super().__init__()
        self.mlp = None
        if not projection_size:
            self.embedding = nn.Parameter(columns)  # (prefix length, layers * 2 * hidden)
            return
        device, hidden_size = tokens.device, tokens.shape[1]
        self.embedding = nn.Parameter(tokens)  # (prefix length, hidden): P'
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, projection_size, device=device),
            nn.Tanh(),
            nn.Linear(projection_size, columns.shape[1], device=device),
        )
        with torch.no_grad():  # solve the last layer for the columns: a real start here too
            nn.init.normal_(self.mlp[0].weight).div_(tokens.std() * math.sqrt(hidden_size))
            features, mean = self.mlp[:2](tokens), columns.mean(0)
            self.mlp[2].bias.copy_(mean)
            solution = torch.linalg.pinv(features, rtol=1e-3) @ (columns - mean)
            self.mlp[2].weight.copy_(solution.t())

    def prompt_embeddings(self) -> Tensor:
        """(prefix length, layers * 2 * hidden)"""
        return self.embedding if self.mlp is None else self.mlp(self.embedding)

    def keys_and_values(
        self, transformer: GPT2Model, dtype: torch.dtype
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Key and value a layer, each (1, heads, prefix length, head size)."""
        config, columns = transformer.config, self.prompt_embeddings().to(dtype)
        parts = columns.unflatten(1, (2 * config.n_layer, 1, config.n_head, -1))
        parts = parts.permute(1, 2, 3, 0, 4).unbind()
        return zip(parts[::2], parts[1::2], strict=True)


def prepend_prefix(transformer: GPT2Model, args: tuple, kwargs: Settings) -> tuple[tuple, Settings]:
    """GPT2Model's forward pre-hook: `transformer.prefix` comes before the text, in training, in
    evaluation and at generate()'s first step.

    Its keys and values fill the cache, text positions start at its length, and the attention mask
    grows by it. Raises ValueError for text that does not fit behind it.
    """
    kwargs |= inspect.signature(transformer.forward).bind_partial(*args).arguments
    prefix, config = transformer.prefix, transformer.config
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    batch_size, length = tokens.shape[:2]
    prefix_length, cache = len(prefix.embedding), kwargs.get("past_key_values")
    seen = cache.get_seq_length() if cache is not None else 0  # 0: the prefix is still to come
    total = max(seen, prefix_length) + length
    if total > config.n_positions:
        limit = f"the model has {config.n_positions} positions"
        raise ValueError(f"prefix and text make {total} tokens; {limit}")
    if (mask := kwargs.get("attention_mask")) is not None:
        if mask.ndim != 2:
            raise ValueError("a prefix needs a 2-D attention mask (no static cache)")
        kwargs["attention_mask"] = F.pad(mask, (prefix_length, 0), value=1)
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + prefix_length
    if not seen:
        if transformer.training and transformer.gradient_checkpointing:
            raise ValueError("gradient checkpointing drops the cache that carries a prefix")
        dtype = autocast_dtype(tokens.device) or transformer.wte.weight.dtype
        if cache is None:
            cache = DynamicCache()
        kwargs["past_key_values"] = cache
        for layer, states in enumerate(prefix.keys_and_values(transformer, dtype)):
            key, value = (part.expand(batch_size, -1, -1, -1) for part in states)
            cache.update(key, value, layer)
    return (), kwargs


# " the of and to in a is that for it was on are as with his they at be this from have or by", in
# GPT-2's tokens.
FREQUENT_WORDS = [
    262, 286, 290, 284, 287, 257, 318, 326, 329, 340, 373, 319, 389, 355, 351, 465, 484, 379, 307,
    428, 422, 423, 393, 416,
]  # fmt: skip


def apply_prefix(
    model: GPT2LMHeadModel, prefix_length: int = 50, *, prefix_type: str = "embedding",
    projection_size: int = 0, init_ids: Iterable[int] | None = None,
    trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Puts `prefix_length` trainable virtual tokens before every text; freezes all else.

    prefix_type: "embedding" or "key_value". projection_size: key_value's reparametrisation (0:
    none). init_ids: the tokens to start from, over and over; by default frequent words. Li & Liang
    (section 7.4) find a start from real words far better than a random one where data is scarce,
    words of the task a little better still, and no difference with all of the data.
    """
    settings = checked("prefix", locals())
    config, transformer = model.config, model.transformer
    check_together(Namespace(**settings))
    if prefix_length >= config.n_positions:
        raise ValueError(
            f"--prefix_length {prefix_length}: leaves no room for text in {config.n_positions} "
            "positions"
        )
    if config.add_cross_attention:
        raise ValueError(
            "--modification_type prefix: the base has cross-attention; a prefix needs a model that "
            "attends to its own text alone"
        )
    start_modification(model, settings)
    start = list(init_ids or FREQUENT_WORDS)
    ids = [start[i % len(start)] % config.vocab_size for i in range(prefix_length)]
    with torch.no_grad():
        tokens = transformer.wte.weight[ids].float()  # (prefix length, hidden), a copy
        prefix: nn.Module = PromptEmbedding(tokens)
        if prefix_type == "key_value":
            columns = key_value_columns(transformer, prefix)
            tokens = tokens + transformer.wpe.weight[:prefix_length]  # tells repeated tokens apart
            prefix = KeyValuePrefix(columns, tokens, projection_size)
    transformer.prefix = prefix
    prefix.hook = transformer.register_forward_pre_hook(prepend_prefix, with_kwargs=True)
    return model


def key_value_columns(transformer: GPT2Model, prompt: PromptEmbedding) -> Tensor:
    """(prefix length, layers * 2 * hidden) fp32: the prompt's keys and values in every layer."""
    training = transformer.training
    transformer.eval()  # the base's dropout stays out of the start
    states = prompt.keys_and_values(transformer, transformer.wte.weight.dtype)
    transformer.train(training)
    parts = torch.cat([part for pair in states for part in pair])  # (2 x layers, heads, ...)
    return parts.permute(2, 0, 1, 3).flatten(1).float()


def text_ids(model: GPT2LMHeadModel, text: str | None) -> list[int] | None:
    """The tokens of --prefix_init_text, by the tokenizer that lies beside the base's weights.

    None for no text, and for a model without weights. Raises ValueError.
    """
    if not text or model.device.type == "meta":
        return None
    directory = getattr(model, "base_path", None)
    if not directory or not matching_files(directory, VOCABULARY_FILES):
        raise ValueError(f"--prefix_init_text {text!r}: the base brings no tokenizer to read it")
    return AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)


# ---- selective freezing and full fine-tuning -----------------------------------------------------


def apply_selective_freezing(
    model: GPT2LMHeadModel, freeze_layers: Iterable[int] | None = None, *,
    freeze_head: bool = False, trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Trains the blocks that `freeze_layers` (None: the lower half) leaves, and the head and final
    LayerNorm unless `freeze_head`. In place.

    GPT-2's head is tied to the token embeddings, so these train with it, and the backward pass then
    reaches the model's input; with `freeze_head` it stops below the lowest trainable block.
    Position embeddings stay frozen.
    """
    blocks = model.transformer.h
    if freeze_layers is None:
        freeze_layers = range(len(blocks) // 2)
    settings = checked("selective", locals())
    frozen = settings["freeze_layers"]
    check_blocks(model, "freeze_layers", frozen)
    if freeze_head and len(frozen) == len(blocks) and not settings["trainable_modules"]:
        raise ValueError("--freeze_layers with --freeze_head: nothing is left to train")
    start_modification(model, settings)
    trained = [block for layer, block in enumerate(blocks) if layer not in frozen]
    for module in trained + ([] if freeze_head else [model.lm_head, model.transformer.ln_f]):
        module.requires_grad_(True)
    return model


def apply_full_finetuning(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Trains every parameter."""
    start_modification(model, checked("full", locals()))
    model.requires_grad_(True)
    return model


# ---- what every technique asks of the model ------------------------------------------------------


def checked(technique: str, arguments: Settings) -> Settings:
    """A technique's settings: the arguments of its `apply_` function, as their flags parse them. A
    flag's first word is left out where the argument lacks it. Raises ValueError.
    """
    settings = {"modification_type": technique, "trainable_modules": []}
    for flag in (*TECHNIQUES[technique].flags, "trainable_modules"):
        name = flag if flag in arguments else flag.partition("_")[2]
        if name in arguments:
            settings[flag] = arguments[name]
    args = with_defaults(**settings)
    return {name: getattr(args, name) for name in settings}


def start_modification(
    model: GPT2LMHeadModel, settings: Settings, wrapped: Iterable[str] = ()
) -> None:
    """Freezes all but the `trainable_modules` and notes the settings in `model.modification`, for
    saving and loading.

    wrapped: the layers that a technique is about to wrap. Raises ValueError, before anything is
    changed, for a module that is not there, or wrapped, and a model that carries a technique.
    """
    if done := getattr(model, "modification", None):
        raise ValueError(
            f"the model carries {done['modification_type']} already: detach() it first"
        )
    modules = []
    for suffix in settings["trainable_modules"]:
        for name, module in modules_named(model, suffix, "trainable_modules").items():
            if any(f"{layer}.".startswith(f"{name}.") for layer in wrapped):
                raise ValueError(f"--trainable_modules {suffix}: {name} is wrapped by LoRA or IA3")
            modules.append(module)
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    model.modification, model.end_tokens = settings, {}
    if not hasattr(model, "base_fingerprint"):
        model.base_fingerprint = fingerprint(model)


def modules_named(model: nn.Module, suffix: str, flag: str) -> dict[str, nn.Module]:
    """The modules with weights whose dotted name is, or ends in, `suffix`.

    Raises ValueError that names the flag, and the modules there are, where there is none.
    """
    modules = {name: m for name, m in model.named_modules() if list(m.parameters())}
    found = {name: m for name, m in modules.items() if f".{name}".endswith(f".{suffix}")}
    if not found:
        leaves = {name.split(".")[-1] for name, m in modules.items() if list(m.parameters(False))}
        raise ValueError(f"--{flag} {suffix}: matches nothing of {', '.join(sorted(leaves))}")
    return found


def check_blocks(model: GPT2LMHeadModel, flag: str, blocks: Iterable[int]) -> None:
    """Raises ValueError for the number of a block that is not there."""
    if outside := [block for block in blocks if block >= model.config.n_layer]:
        last = model.config.n_layer - 1
        raise ValueError(f"--{flag} {outside[0]}: the model has layers 0 to {last}")


def is_tied(model: GPT2LMHeadModel) -> bool:
    """Whether the head is the token embeddings, as in every published GPT-2."""
    return getattr(model.lm_head, "weight", None) is model.transformer.wte.weight


# ---- the table of techniques ---------------------------------------------------------------------


class Flag(NamedTuple):
    """A command-line flag. Its type holds the legal range: a function that parses text, the legal
    words, or bool, which may stand bare."""

    default: Any
    type: Callable[[str], Any] | Iterable[str]
    help: str


def number(kind: type, low: float, below: float = 1_000_000_000) -> Callable[[str], Any]:
    """A flag's type: an int or float with low <= number < below."""

    def parse(text: str) -> int | float:
        if not low <= (value := kind(text)) < below:  # so of NaN, too
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} >= {low} and < {below}"  # argparse states it
    return parse


at_least_one = number(int, 1)


def nonempty(text: str) -> str:
    """A flag's type: any text but an empty one."""
    if not text:
        raise ValueError
    return text


def names(text: str) -> list[str]:
    """A flag's type: names, separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers_and_ranges(text: str) -> list[int]:
    """A flag's type: layer numbers and ranges, such as 0,1,4-7."""
    layers: set[int] = set()
    for part in names(text):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not 0 < len(numbers) < 10_000:
            raise ValueError
        layers.update(numbers)
    return sorted(layers)


def true_or_false(text: str) -> bool:
    """A flag's type: true or false."""
    return bool(("false", "true").index(text.lower()))


class Technique(NamedTuple):
    """All that the scripts know of a technique: a new one is a row of TECHNIQUES."""

    apply: Callable[[GPT2LMHeadModel, Namespace], GPT2LMHeadModel]
    learning_rate: Callable[[Namespace], float]
    compared: list[tuple[str, str, dict]]  # rows of --compare: label, paper, settings
    flags: dict[str, Flag] = {}  # its settings, kept in modification.json  # noqa: RUF012
    layout: str = "state"  # of its files, one of LAYOUTS
    merges: bool = False  # what it trains can be folded into the base's weights


# Learning rates as published for pretrained models: of GPT-2 where there is one, else the nearest.
TECHNIQUES = {
    "lora": Technique(
        apply=lambda model, args: apply_lora(
            model, args.lora_rank, args.lora_alpha, dropout=args.lora_dropout,
            target_modules=args.lora_target_modules, layers=args.lora_layers,
            scaling=args.lora_scaling, dora=args.lora_dora,
            trainable_modules=args.trainable_modules,
        ),
        flags={
            "lora_rank": Flag(4, at_least_one, "rank r of A and B; >= 1"),
            "lora_alpha": Flag(
                8.0, number(float, 1e-9), "the update is scaled by alpha / r; > 0"
            ),
            "lora_dropout": Flag(0.0, number(float, 0, 1), "on A's input, while training"),
            "lora_target_modules": Flag(
                ["c_attn", "c_proj", "c_fc"], names,
                "by suffix; c_attn.q, .k and .v are thirds of the fused projection",
            ),
            "lora_layers": Flag(None, numbers_and_ranges, "of these blocks alone: 6-11 (all)"),
            "lora_scaling": Flag(
                "standard", ("standard", "rank_stabilized"),
                "alpha / r, or rank_stabilized: alpha / sqrt(r)",
            ),
            "lora_dora": Flag(False, bool, "DoRA: a magnitude an output, and a direction"),
        },
        # Hu et al., table 11: 2e-4 at alpha / r = 8 on q and v; at 2, on all layers, somewhat more
        learning_rate=lambda args: 5e-4,
        compared=[
            ("LoRA r=4, all Conv1D", "Hu 2021", {}),
            ("LoRA r=4, query and value", "Hu 2021",
             {"lora_target_modules": ["c_attn.q", "c_attn.v"]}),
            ("DoRA r=4, all Conv1D", "Liu 2024", {"lora_dora": True}),
        ],
        layout="lora",
        merges=True,
    ),
    "adapter": Technique(
        apply=lambda model, args: apply_adapters(
            model, args.adapter_size, placement=args.adapter_placement,
            activation=args.adapter_activation, trainable_modules=args.trainable_modules,
        ),
        flags={
            "adapter_size": Flag(64, at_least_one, "width of the bottleneck; >= 1"),
            "adapter_placement": Flag(
                "pfeiffer", ("pfeiffer", "houlsby"), "pfeiffer: one a block, or houlsby: two"
            ),
            "adapter_activation": Flag(
                None, ACTIVATIONS,
                "relu, gelu or silu (pfeiffer: relu, houlsby: gelu, as published)",
            ),
        },
        learning_rate=lambda args: 1e-4,  # AdapterFusion, appendix A.2; Hu et al., table 12
        compared=[
            ("adapters 64, two a block", "Houlsby 2019", {"adapter_placement": "houlsby"}),
            ("adapters 64, one a block", "Pfeiffer 2020", {}),
        ],
    ),
    "prefix": Technique(
        apply=lambda model, args: apply_prefix(
            model, args.prefix_length, prefix_type=args.prefix_type,
            projection_size=args.prefix_projection_size,
            init_ids=text_ids(model, args.prefix_init_text),
            trainable_modules=args.trainable_modules,
        ),
        flags={
            "prefix_length": Flag(50, at_least_one, "virtual tokens; >= 1"),
            "prefix_type": Flag(
                "embedding", ("embedding", "key_value"),
                "embedding: at the input, or key_value: in each layer",
            ),
            "prefix_projection_size": Flag(
                0, number(int, 0), "key_value only: width of an MLP; 0: none"
            ),
            "prefix_init_text": Flag(
                None, nonempty, "the words that it starts from (the of and to in ...)"
            ),
        },
        # Li & Liang, table 6, with their MLP; without it, P-tuning v2's scripts
        learning_rate=lambda args: 8e-5 if args.prefix_projection_size else 5e-3,
        compared=[
            ("prefix 50, keys and values", "Li & Liang 2021", {"prefix_type": "key_value"}),
            ("prefix 50, embeddings", "Lester 2021", {}),
        ],
        layout="prefix",
    ),
    "ia3": Technique(
        apply=lambda model, args: apply_ia3(model, args.trainable_modules),
        learning_rate=lambda args: 3e-3,  # the paper's recipe, T-Few
        compared=[("IA3", "Liu 2022", {})],
        layout="ia3",
        merges=True,
    ),
    "bitfit": Technique(
        apply=lambda model, args: apply_bitfit(model, args.trainable_modules),
        learning_rate=lambda args: 1e-3,  # the largest that the paper tries, for BERT
        compared=[("biases alone (BitFit)", "Ben Zaken 2022", {})],
        merges=True,
    ),
    "layernorm": Technique(
        apply=lambda model, args: apply_layernorm_tuning(model, args.trainable_modules),
        learning_rate=lambda args: 1e-3,  # as for biases, which are vectors too
        compared=[("LayerNorms alone", "Zhao 2023", {})],
        merges=True,
    ),
    "selective": Technique(
        apply=lambda model, args: apply_selective_freezing(
            model, args.freeze_layers, freeze_head=args.freeze_head,
            trainable_modules=args.trainable_modules,
        ),
        flags={
            "freeze_layers": Flag(
                None, numbers_and_ranges, "from 0; ranges such as 0-5 (the lower half)"
            ),
            "freeze_head": Flag(
                False, bool, "also freeze the tied head and the final LayerNorm"
            ),
        },
        learning_rate=lambda args: 5e-5,
        compared=[("selective, lower half frozen", "", {})],
        layout="plain",
    ),
    "full": Technique(
        apply=lambda model, args: apply_full_finetuning(model),
        learning_rate=lambda args: 5e-5,  # Li & Liang, table 6
        compared=[("full fine-tuning", "", {})],
        layout="plain",
    ),
}  # fmt: skip


def modify(model: GPT2LMHeadModel, args: Namespace) -> GPT2LMHeadModel:
    """Applies the technique that the flags name, in place."""
    return TECHNIQUES[args.modification_type].apply(model, args)


def final_modify(args: object = None, **overrides: Any) -> GPT2LMHeadModel:
    """The base model with a technique applied, fp32, called like any GPT2LMHeadModel.

    args: any object with the model flags as attributes (an argparse Namespace, a dataclass); what
    it lacks takes the flag's default, and keyword arguments stand above both:
    `final_modify(modification_type="prefix")`.
    Raises ValueError that names the flag, its value and what is legal.
    """
    settings = with_defaults(args, **overrides)
    return modify(load_base(settings), settings)


# ---- counting ------------------------------------------------------------------------------------


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all parameters, trainable ones); tied weights count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def trainable_state(model: nn.Module) -> Tensors:
    """The trainable parameters by name, not copied."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def statistics(model: GPT2LMHeadModel) -> str:
    """The model's parameter counts and what trains, a line a parameter."""
    total, trainable = parameter_counts(model)
    lines = [
        f"""📊 Final Parameter Statistics:
   Total parameters: {total:,}
   Trainable parameters: {trainable:,}
   Trainable ratio: {trainable / total:.4f} ({trainable / total:.2%})

🔍 Parameter Trainability Status:"""
    ]
    for name, parameter in model.named_parameters():
        mark, status = ("✅", "Trainable") if parameter.requires_grad else ("❄️ ", "Frozen")
        lines.append(f"  {mark} {name}: {status} ({parameter.numel():,} params)")
    if is_tied(model):
        lines.append("  🔗 lm_head.weight: tied to transformer.wte.weight")
    return "\n".join(lines)


# ---- saving and loading --------------------------------------------------------------------------

STATE, METADATA, MANIFEST = "adapter.safetensors", "modification.json", "manifest.json"  # ours


def save_trained(model: GPT2LMHeadModel, directory: str | Path) -> None:
    """Writes what was trained, in its technique's layout, and `modification.json` beside it:
    PEFT's for LoRA and prefixes, a plain Hugging Face model for selective and full, safetensors of
    our own for adapters. `load_trained` reads all of them. Raises OSError, SafetensorError."""
    directory, settings, config = Path(directory), dict(model.modification), model.config
    directory.mkdir(parents=True, exist_ok=True)
    save, _ = LAYOUTS[TECHNIQUES[settings["modification_type"]].layout]
    settings |= save(model, directory) or {}
    sizes = ("n_layer", "n_embd", "n_head", "vocab_size")
    settings["base_config"] = {name: getattr(config, name) for name in sizes}
    settings["base_model_name_or_path"] = name = base_reference(model)
    settings["base_fingerprint"] = model.base_fingerprint
    if name and Path(name).is_dir():
        with suppress(ValueError):  # no path leads to another drive of Windows
            relative = os.path.relpath(Path(name).resolve(), directory.resolve())
            settings["base_relative_path"] = Path(relative).as_posix()
    write_json(directory / METADATA, settings | model.end_tokens)


def base_reference(model: GPT2LMHeadModel) -> str | None:
    """The base as it was named; a local one by its absolute path, as PEFT looks for it from the
    current directory."""
    name = getattr(model, "base_name", model.name_or_path) or None
    return os.path.abspath(name) if name and Path(name).is_dir() else name


def load_trained(
    directory: str | Path, base: str | Path | GPT2LMHeadModel | None = None, *, dropout: float = 0.0
) -> GPT2LMHeadModel:
    """What a run saved (in best/ or final/, see `result_directory`), on its base model, ready to
    use or to train on; a PEFT-made LoRA too.

    base: a name or directory, by default the one that the result names. Or a loaded model, which
    stays as it is: the new one shares its tensors, and costs no more memory than what was trained.
    Raises ValueError.
    """
    directory = result_directory(directory)
    if (directory / MANIFEST).exists():
        verify_directory(directory)
    settings = trained_settings(directory)
    args = with_defaults(Namespace(**settings), dropout=dropout)
    if is_plain(args.modification_type):
        if isinstance(base, nn.Module):
            raise ValueError(f"{directory}: a whole model, it shares nothing; give no base")
        args.model_name_or_path = str(directory)
        model = load_base(args)
    else:
        model = base_of(directory, settings, base, args)
    _, load = LAYOUTS[TECHNIQUES[args.modification_type].layout]
    try:
        load(model, directory, args)
    except (TypeError, AttributeError, TimeoutError, regex.error) as error:
        raise ValueError(f"{directory}: its settings are damaged: {error}") from error
    except ValueError as error:
        where = "" if str(error).startswith(str(directory)) else f"{directory}: "
        raise ValueError(f"{where}{error}") from None
    model.end_tokens = {name: settings[name] for name in SPECIAL_TOKENS & settings.keys()}
    return model.eval()


def base_of(
    directory: Path, settings: Settings, base: str | Path | GPT2LMHeadModel | None,
    args: Namespace,
) -> GPT2LMHeadModel:  # fmt: skip
    """The base that was asked for; else the first that fits of where the result says it lies.

    Raises ValueError.
    """
    errors = []
    for choice in [base] if base else settings["bases"]:
        try:
            if isinstance(choice, nn.Module):
                model = share_weights(choice)
                model.base_fingerprint = fingerprint(model)
            else:
                args.model_name_or_path = str(choice)
                model = load_base(args)
            check_base(model, settings, directory, chosen=bool(base))
            return model
        except ValueError as error:
            errors.append(str(error) if base else f"the base of {directory}: {error}")
    raise ValueError([*errors, f"{directory}: names no base model; give --model_name_or_path"][0])


def check_base(model: GPT2LMHeadModel, settings: Settings, directory: Path, chosen: bool) -> None:
    """Raises ValueError for a base of another size than the one trained on; for one with other
    weights only if it was not chosen by name."""
    where = f"--model_name_or_path {base_reference(model)}"
    sizes = settings.get("base_config", {})
    found = {name: getattr(model.config, name, None) for name in sizes}
    if found != sizes:
        raise ValueError(f"{where}: sizes {found}; {directory} was trained on {sizes}")
    if settings.get("base_fingerprint") not in (None, model.base_fingerprint):
        message = f"{where}: not the weights that {directory} was trained on"
        if not chosen:
            raise ValueError(f"{message}; they have changed since")
        logger.warning(message)  # perhaps the same model at another precision


def share_weights(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A model of its own whose weights are the tensors of another: some hundred kilobytes."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, shared)


def result_directory(directory: str | Path) -> Path:
    """The directory itself if it holds a result; else, of a run, best/ or final/."""
    for path in (Path(directory), Path(directory, "best"), Path(directory, "final")):
        if (path / METADATA).exists() or (path / PEFT_CONFIG).exists():
            return path
    return Path(directory)


def trained_settings(directory: Path) -> Settings:
    """The settings of what a run of ours saved, or PEFT. Raises ValueError that names the file."""
    files = [path for path in (directory / METADATA, directory / PEFT_CONFIG) if path.is_file()]
    if not files:
        raise ValueError(
            f"{directory}: no such directory, or it holds neither {METADATA} nor {PEFT_CONFIG}: "
            "nothing that was trained to its end"
        )
    settings = read_json(path := files[0])
    try:
        settings = settings if path.name == METADATA else peft_settings(settings)
        technique = with_defaults(Namespace(**settings)).modification_type
        if "modification_type" not in settings:
            raise ValueError("lacks modification_type")
        if technique == "adapter" and "adapter_activation" not in settings:
            raise ValueError("adapters of an earlier version stand elsewhere: train them again")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # Results of earlier versions hold the path from the result as the base's name.
    name, relative = settings.get("base_model_name_or_path"), settings.get("base_relative_path")
    relative = relative or (name if str(name).startswith(os.pardir) else None)
    beside = [os.path.normpath(directory / relative)] if relative else []
    settings["bases"] = [*filter(os.path.isdir, beside), *([name] if name else [])]
    settings["base_model_name_or_path"] = next(iter(settings["bases"]), None)
    return settings


def prompt_settings(directory: str | Path) -> Settings:
    """How a result, or a model that was merged, is to be prompted, as far as it says: text_format
    and max_length."""
    path = Path(directory, METADATA)
    settings = read_json(path) if path.is_file() else {}
    return {name: settings[name] for name in {"text_format", "max_length"} & settings.keys()}


def save_state(model: GPT2LMHeadModel, directory: Path) -> None:
    """All that trains, by its names in the model."""
    write_tensors(trainable_state(model), directory / STATE)


def load_state(model: GPT2LMHeadModel, directory: Path, args: Namespace) -> None:
    """What save_state wrote."""
    modify(model, args)
    path = directory / STATE
    put_tensors(model, read_tensors(path), path, required=trainable_state(model))


def save_plain(model: GPT2LMHeadModel, directory: Path) -> None:
    """A plain Hugging Face model, at the precision of the base's files, which are not read again.

    `model.exact_weights` are those of the frozen ones that training rounds; it is they that are
    written.
    """
    dtype, exact = getattr(model, "stored_dtype", model.dtype), getattr(model, "exact_weights", {})
    weights = dict(model.named_parameters()) | exact  # a tied head once
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    write_tensors(weights, directory / "model.safetensors")
    config, generation = copy.deepcopy((model.config, model.generation_config))
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.update(model.end_tokens)
    generation.update(**model.end_tokens)
    config.save_pretrained(directory)
    generation.save_pretrained(directory)


def plain_shapes(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A plain model without weights, with a configuration of its own."""
    with torch.device("meta"):
        return GPT2LMHeadModel(copy.deepcopy(model.config))


def is_plain(technique: str) -> bool:
    """Whether a technique is saved as a plain Hugging Face model, that is its own base."""
    return TECHNIQUES[technique].layout == "plain"


def set_end_token(model: GPT2LMHeadModel, token_id: int, pad_token_id: int | None = None) -> None:
    """Notes the token that ends a text, as training teaches it, and the padding (by default the
    same). The configuration of what is saved or merged names them, so that generation stops there;
    the model's own is left alone, since transformers looks for padding where it names some."""
    pad_token_id = token_id if pad_token_id is None else pad_token_id
    model.end_tokens = {"eos_token_id": token_id, "pad_token_id": pad_token_id}


# ---- PEFT's layout -------------------------------------------------------------------------------

WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's file names
PROMPT = "prompt_embeddings"  # PEFT's name of a prefix


def save_lora(model: GPT2LMHeadModel, directory: Path) -> None:
    """PEFT's LoRA layout.

    n thirds of a fused projection, each of rank r, have no name in PEFT; they are exactly one LoRA
    of rank n r with the same scaling, A stacked and B in blocks. What differs from layer to layer
    goes into PEFT's patterns.
    """
    layers, settings = lora_layers(model), model.modification
    rank, alpha = settings["lora_rank"], settings["lora_alpha"]
    tensors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    tensors |= {f"{name}.lora_B": layer.full_B() for name, layer in layers.items()}
    ranks = {name: len(layer.lora_A) for name, layer in layers.items()}
    alphas = {
        name: layer.scaling * scaling_divisor(ranks[name], layer.rslora)
        for name, layer in layers.items()
    }
    biases = {n: p.requires_grad for n, p in model.named_parameters() if n.endswith(".bias")}
    wrapped_biases = any(trains and ".original_layer." in name for name, trains in biases.items())
    write_as_peft(model, tensors, directory, {
        "peft_type": "LORA",
        "use_rslora": settings["lora_scaling"] == "rank_stabilized",
        "use_dora": settings["lora_dora"],
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": settings["lora_dropout"],
        "target_modules": sorted(layers),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if not math.isclose(a, alpha)},
        "fan_in_fan_out": all(isinstance(la.original_layer, Conv1D) for la in layers.values()),
        "bias": "all" if all(biases.values()) else "lora_only" if wrapped_biases else "none",
    })  # fmt: skip


def save_ia3(model: GPT2LMHeadModel, directory: Path) -> None:
    """PEFT's IA3 layout."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, IA3Layer)}
    feedforward = sorted(name for name, layer in layers.items() if layer.feedforward)
    tensors = {
        f"{name}.ia3_l": layer.ia3_l.view((1, -1) if name in feedforward else (-1, 1))
        for name, layer in layers.items()
    }
    write_as_peft(model, tensors, directory, {
        "peft_type": "IA3", "target_modules": sorted(layers), "feedforward_modules": feedforward,
        "fan_in_fan_out": True,
    })  # fmt: skip


def save_prefix(model: GPT2LMHeadModel, directory: Path) -> Settings:
    """PEFT's PROMPT_TUNING or PREFIX_TUNING layout; the reparametrisation is computed out."""
    prefix = model.transformer.prefix
    kind = "PREFIX_TUNING" if isinstance(prefix, KeyValuePrefix) else "PROMPT_TUNING"
    config = {"peft_type": kind, "num_virtual_tokens": len(prefix.embedding)}
    write_as_peft(model, {PROMPT: prefix.prompt_embeddings()}, directory, config)
    return {"prefix_projection_size": 0}


def write_as_peft(
    model: GPT2LMHeadModel, tensors: Tensors, directory: Path, config: Settings
) -> None:
    """PEFT's two files: a technique's tensors and what trains besides them, by PEFT's names.

    Without a task_type PEFT would load a prefix, and then ignore it. It has no modules_to_save for
    a prefix, but loads what is named as it names the base's weights.
    """
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True}
    config["base_model_name_or_path"] = base_reference(model)
    trained = trainable_state(model).items()
    besides = {n: t for n, t in trained if n not in tensors and ".prefix." not in n}
    if PROMPT in tensors:
        tensors |= {f"base_model.{name}": tensor for name, tensor in besides.items()}
    else:
        if "transformer.wte.weight" in besides and is_tied(model):
            # With wte alone, PEFT would keep the old head.
            besides["lm_head.weight"] = besides["transformer.wte.weight"].clone()
        whole = {n.rpartition(".")[0] for n in besides if not n.endswith(".bias")}
        config["modules_to_save"] = sorted(whole) or None
        tensors = {f"base_model.model.{name}": t for name, t in (tensors | besides).items()}
    names = {n: re.sub(r"(\.lora_[AB])$", r"\1.weight", n) for n in tensors}
    names = {n: name.replace(".original_layer.", ".base_layer.") for n, name in names.items()}
    write_tensors({names[n]: tensor for n, tensor in tensors.items()}, directory / WEIGHTS)
    write_json(directory / PEFT_CONFIG, config)


def load_peft(model: GPT2LMHeadModel, directory: Path, args: Namespace) -> None:
    """A LoRA, an IA3 or a prefix, with what was trained besides it: ours, or PEFT's own."""
    path, older = directory / WEIGHTS, directory / "adapter_model.bin"
    path = older if older.exists() and not path.exists() else path
    config, tensors = read_json(directory / PEFT_CONFIG), peft_tensors(path)
    if args.modification_type == "prefix":
        args.prefix_init_text = None  # what it started from does not count any more
    elif is_tied(model):
        pair = [tensors.get("transformer.wte.weight"), tensors.get("lm_head.weight")]
        if pair[0] is not pair[1] and (None in pair or not torch.equal(*pair)):
            # One of the two alone was changed: the head gets a weight of its own.
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
    wrapped = sorted({key.split(".lora_")[0] for key in tensors if ".lora_" in key})
    args.lora_target_modules = args.lora_target_modules or wrapped
    modify(model, args)
    for name, layer in lora_layers(model).items():
        fit_layer(name, layer, tensors, config)
    put_tensors(model, tensors, path, required=trainable_state(model))
    for name in tensors:
        if name.endswith(".bias"):  # trained by PEFT's option `bias`
            model.get_parameter(name).requires_grad_(True)


def fit_layer(name: str, layer: LoRALayer, tensors: Tensors, config: Settings) -> None:
    """Gives a layer the rank of its tensors and the alpha that PEFT's configuration has for it;
    cuts the B of thirds, which a run of ours adapted, out of its blocks."""
    A, B, n = layer.lora_A, layer.lora_B, len(layer.thirds) or 1
    rank = max(1, len(tensors.get(f"{name}.lora_A", A)) // n)  # put_tensors tells what lacks
    A.data, B.data = A.new_empty(n * rank, A.shape[1]), B.new_empty(len(B), rank)
    exceptions = (config.get("alpha_pattern") or {}).items()
    fits = (a for key, a in exceptions if regex.fullmatch(rf"(.*\.)?({key})", name, timeout=1))
    alpha = next(fits, config.get("lora_alpha", 8))  # as in PEFT, of the first pattern that fits
    layer.scaling = alpha / scaling_divisor(n * rank, layer.rslora)
    stored = tensors.get(f"{name}.lora_B", B)
    if layer.thirds and stored.shape == layer.full_B().shape:
        blocks = stored.unflatten(0, (3, -1)).unflatten(2, (n, -1))  # (3, out / 3, n, r)
        blocks = [blocks["qkv".index(third), :, i] for i, third in enumerate(layer.thirds)]
        tensors[f"{name}.lora_B"] = torch.cat(blocks)


def peft_settings(config: Settings) -> Settings:
    """The settings of a LoRA or IA3 directory that PEFT itself wrote, from its configuration."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind not in ("LORA", "IA3"):
        raise ValueError(f"peft_type {kind!r}; of PEFT's own directories LORA and IA3 load")
    if config.get("alora_invocation_tokens"):  # other options have tensors that find no place
        raise ValueError("alora_invocation_tokens is not supported")
    if start not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError(f"init_lora_weights {start!r} changes the base; not supported")
    names = {
        "base_model_name_or_path": "base_model_name_or_path", "trainable_modules":
        "modules_to_save", "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout":
        "lora_dropout", "lora_dora": "use_dora",
    }  # fmt: skip
    settings = {ours: config[name] for ours, name in names.items() if config.get(name)}
    return settings | {
        "modification_type": kind.lower(),
        "lora_target_modules": [],  # PEFT's may be patterns: the layers in its file are taken
        "lora_scaling": "rank_stabilized" if config.get("use_rslora") else "standard",
    }


def peft_tensors(path: Path) -> Tensors:
    """The tensors of PEFT's file by the names, and in the shapes, that they have in our models."""
    tensors = {}
    for key, tensor in read_tensors(path).items():
        # PEFT writes resized embeddings under two further names.
        if ".original_module." not in key and ".modules_to_save." not in key:
            name = re.sub(r"^base_model\.(model\.)?|(?<=\.lora_[AB])\.weight$", "", key)
            name = name.replace(".base_layer.", ".original_layer.")
            name = name.replace(PROMPT, "transformer.prefix.embedding")
            tensors[name] = tensor.flatten() if name.endswith(".ia3_l") else tensor
    return tensors


# How each layout is saved and loaded. To save returns the settings that it changed.
LAYOUTS: dict[str, tuple[Callable[..., dict], Callable[..., None]]] = {
    "lora": (save_lora, load_peft),
    "ia3": (save_ia3, load_peft),
    "prefix": (save_prefix, load_peft),
    "state": (save_state, load_state),
    "plain": (save_plain, lambda model, directory, args: modify(model, args)),  # its own base
}


# ---- merging -------------------------------------------------------------------------------------


@torch.no_grad()
def merge_lora(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Folds every update, LoRA's or IA3's, into its layer and takes the wrappers out, in place: a
    plain model remains, with the same logits. Raises ValueError for a technique that is no change
    of weights."""
    technique, training = (
        getattr(model, "modification", {}).get("modification_type"),
        model.training,
    )
    if technique not in TECHNIQUES or not TECHNIQUES[technique].merges:
        raise ValueError(
            f"{technique} cannot be folded into the base: it is no update of weights, or a plain "
            "model already"
        )
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    before = model.eval()(ids).logits
    for name, layer in [*model.named_modules()]:
        if hasattr(layer, "original_layer"):
            if getattr(layer, "merged", None) is None:
                layer.merge()
            model.set_submodule(name, layer.original_layer)
    difference, size = (model(ids).logits - before).abs().max(), before.abs().max()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    is_plain_now = model.state_dict().keys() == plain_shapes(model).state_dict().keys()
    if not (is_plain_now and difference <= tolerance * size):
        raise ValueError(
            f"{technique} cannot be folded into the base: what remains is another model"
        )
    del model.modification, model.base_fingerprint
    model.base_path = model.base_name = None  # the merged weights lie in no file yet
    return model.train(training)


def detach(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Takes a technique off, in place: the plain model remains, bit for bit, and another technique
    may follow. Raises ValueError where weights of the base itself were trained."""
    base_weights = plain_shapes(model).state_dict().keys()
    for name in trainable_state(model):
        if name.replace(".original_layer.", ".") in base_weights:
            raise ValueError(f"{name} was trained: the base's own is gone, load the base again")
    for name, module in [*model.named_modules()]:
        if hasattr(module, "original_layer"):
            if getattr(module, "merged", None) is not None:
                module.unmerge()
            model.set_submodule(name, module.original_layer)
        elif hasattr(module, "hook"):
            module.hook.remove()
            parent, _, child = name.rpartition(".")
            delattr(model.get_submodule(parent), child)
    del model.modification
    return model.requires_grad_(True)


def merge_directory(
    adapter_path: str, merge_to: str, model_name_or_path: str | None = None
) -> None:
    """Folds the LoRA of `adapter_path` into its base and writes a plain Hugging Face model, with
    the adapter's tokenizer or else the base's, or nothing. Raises ValueError, OSError."""
    directory, target = result_directory(adapter_path), Path(merge_to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--merge_to {merge_to}: exists and is not an empty directory")
    model, where = load_trained(directory, model_name_or_path), f"--adapter_path {directory}"
    technique, base = model.modification["modification_type"], str(model.base_name)
    settings = {"modification_type": "full"} | prompt_settings(directory) | model.end_tokens
    source = directory if matching_files(directory, VOCABULARY_FILES) else Path(model.base_path)
    try:
        merge_lora(model)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    target.mkdir(parents=True, exist_ok=True)
    try:
        save_plain(model, target)
        write_json(target / METADATA, settings)
        for file in matching_files(source, TOKENIZER_FILES):
            copied = target / file.relative_to(source)
            copied.parent.mkdir(exist_ok=True)
            shutil.copy(file, copied)
        card = (
            f"{card_metadata(base, 'transformers')}# {technique}, merged into {Path(base).name}\n\n"
            "To load it: `AutoModelForCausalLM.from_pretrained(DIR)`\n"
        )
        (target / "README.md").write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    logger.info("Merged: %s holds a plain GPT-2 for AutoModelForCausalLM", merge_to)


def card_metadata(base_name: str, library: str) -> str:
    """The head of a model card, as the hub reads it; the base where it has it."""
    base = None if Path(base_name).exists() else base_name
    metadata = ModelCardData(
        base_model=base, library_name=library or None, pipeline_tag="text-generation"
    )
    return f"---\n{metadata}\n---\n"


# ---- files ---------------------------------------------------------------------------------------

VOCABULARY_FILES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
TOKENIZER_FILES = (
    *VOCABULARY_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LFS_POINTER = b"version https://git-lfs"


def write_tensors(tensors: Tensors, path: Path) -> None:
    """Writes a safetensors file. It counts only when every tensor in it returns as it was: raises
    OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    for name, tensor in load_file(path).items():
        if not torch.equal(tensor, tensors[name]):
            raise OSError(f"{path}: {name} does not read back as it was written")


def read_tensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file, or of a .bin, where nothing but tensors is unpickled.

    Raises ValueError for a damaged file, one that holds something else, quantised weights or NaN.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError("a git-LFS pointer; fetch the file itself: git lfs pull")
        is_pickle = path.suffix == ".bin"
        tensors = torch.load(path, "cpu", weights_only=True) if is_pickle else load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype not in (*FLOATS, torch.uint8, torch.bool):  # masks, random states
                raise ValueError(f"{name} is {tensor.dtype}: quantised, not in full precision")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite values")
        return tensors
    except AttributeError:
        raise ValueError(f"{path}: holds something else than tensors by name") from None
    except (pickle.UnpicklingError, EOFError):
        raise ValueError(
            f"{path}: damaged, or holds objects, which could run code and are not loaded; give "
            "model.safetensors"
        ) from None
    except Exception as error:  # of any type, for damaged files
        raise ValueError(f"{path}: {first_line(error)}") from None


def put_tensors(
    model: nn.Module, tensors: Tensors, path: Path | str, required: Iterable[str] = ()
) -> None:
    """Copies tensors into the parameters of these names, into memory of their own: what these held
    before may be another model's too.

    Raises ValueError for one that has no place, or another shape there, and for a required one that
    is not given.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    try:
        if missing := set(required) - tensors.keys():
            raise ValueError(f"lacks {min(missing)}")
        for name, tensor in tensors.items():
            if name not in parameters:
                raise ValueError(f"{name} has no place in this model")
            if parameters[name].shape != tensor.shape:
                place = tuple(parameters[name].shape)
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model's {place}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        place = parameters[name]
        place.data = tensor.to(place.device, place.dtype, copy=True)


def write_json(path: Path, content: Settings) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Settings:
    """A JSON object. Raises ValueError that names the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.startswith(LFS_POINTER.decode()):
            raise ValueError("a git-LFS pointer; fetch the file itself: git lfs pull")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def checksums(directory: Path) -> dict[str, str]:
    """The sha256 of each file in a directory and below it."""
    sums = {}
    for path in filter(Path.is_file, directory.rglob("*")):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        sums[path.relative_to(directory).as_posix()] = digest.hexdigest()
    return sums


def write_manifest(directory: Path, leave_out: str = "") -> None:
    """Notes the checksums of the files in a directory, but one."""
    sums = checksums(directory)
    sums.pop(leave_out, None)
    write_json(directory / MANIFEST, {"files": sums})


def verify_directory(directory: Path) -> None:
    """Raises ValueError unless every file is there as its manifest says."""
    expected, found = read_json(directory / MANIFEST).get("files"), checksums(directory)
    for name, checksum in (expected or {MANIFEST: "damaged"}).items():
        if found.get(name) != checksum:  # a path that leads elsewhere is not among those found
            fault = "damaged (its checksum differs)" if name in found else "missing"
            raise ValueError(f"{directory}: {name} is {fault}; if on purpose, delete {MANIFEST}")


def matching_files(directory: str | Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a directory whose names match a pattern."""
    paths = (path for pattern in patterns for path in Path(directory).glob(pattern))
    return [path for path in paths if path.is_file()]


def first_line(error: Exception) -> str:
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())  # the line after a colon belongs to it
    return text.partition("\n")[0] or type(error).__name__


# ---- base models ---------------------------------------------------------------------------------

# (layers, hidden size, heads): enough to count parameters with no weights at hand
GPT2_SIZES = {
    "distilgpt2": (6, 768, 12), "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25),
}  # fmt: skip
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or their shards; the first counts
SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
# What of config.json is about the model; the rest is about generating or about other code.
CONFIG_KEYS = {*GPT2Config.__annotations__, *GPT2Config.attribute_map, "dtype", "torch_dtype"}


def load_base(args: Namespace, device: str = "cpu") -> GPT2LMHeadModel:
    """The base model in fp32, all of it trainable, its own dropouts set to --dropout; on device
    "meta" its shapes alone.

    `model.base_path` is where its weights lie (None: random). Raises ValueError; weights are never
    filled in quietly.
    """
    path, name = None, None if args.from_scratch else str(args.model_name_or_path)
    where = f"--model_name_or_path {name}" if name else "--from_scratch"
    try:
        if name and device != "meta":
            path = locate(name)
            model = load_weights(path)
        else:
            with torch.device(device):
                model = GPT2LMHeadModel(read_config(args))
    except Exception as error:  # of any type, for settings that no model can have
        reason = first_line(error).removeprefix(f"{where}: ").removeprefix(f"{path}{os.sep}")
        raise ValueError(f"{where}: {reason}") from None
    if not name and device != "meta":
        logger.warning("RANDOM WEIGHTS: --from_scratch starts at random, nothing is pretrained")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = args.dropout
    model.base_path, model.base_name, model.base_fingerprint = path, name, fingerprint(model)
    return model


def load_weights(directory: str) -> GPT2LMHeadModel:
    """The model of a directory, in fp32: its config.json and its weights, and no adapter or
    generation settings that lie beside them.

    `model.stored_dtype` is the files' precision. Raises ValueError where weights and configuration
    do not fit exactly.
    """
    config, tensors = stored_config(directory), {}
    for file in weight_files(Path(directory)):
        tensors |= read_tensors(file)
    masks = (".attn.bias", ".attn.masked_bias")  # in older files
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(masks)}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)  # what does not fit is told below
    try:
        model, unfit = GPT2LMHeadModel.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    finally:
        transformers_logging.set_verbosity(verbosity)
    for what, names in unfit.items():
        if names:
            raise ValueError(f"its weights do not fit config.json: {what} {min(map(str, names))}")
    model.config.tie_word_embeddings = is_tied(model)  # apart, where the file holds two that differ
    model.stored_dtype = max((t.dtype for t in tensors.values()), key=lambda dtype: dtype.itemsize)
    return model


def weight_files(directory: Path) -> list[Path]:
    """Which files are this model's weights: the only place that decides.

    model.safetensors comes before pytorch_model.bin, one file before its shards. Nothing else in
    the directory counts, such as an adapter. Raises ValueError.
    """
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).exists():
            return [directory / name]
        if index.exists():
            shards = set(read_json(index)["weight_map"].values())
            return [directory / shard for shard in sorted(shards)]
    raise ValueError(f"holds neither {' nor '.join(WEIGHT_FILES)}")


def fingerprint(model: nn.Module) -> str:
    """Tells one base model from another: a hash of the first values of each of its parameters.
    "" for shapes alone."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            return ""
        values = parameter.detach().flatten()[:256].float().cpu().numpy()
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]


def read_config(args: Namespace) -> GPT2Config:
    """The base model's configuration: the flags', a published size's or a directory's.

    Raises ValueError for anything but a GPT-2.
    """
    if args.from_scratch:
        end = args.vocab_size - 1  # GPT-2's end-of-text is its last token
        sizes = {name: getattr(args, name) for name in SCRATCH_FLAGS}
        return GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    name = args.model_name_or_path
    size = GPT2_SIZES.get(name.removeprefix("openai-community/").removeprefix("distilbert/"))
    if size and not Path(name).exists():
        return GPT2Config(n_layer=size[0], n_embd=size[1], n_head=size[2])
    return stored_config(locate(name))


def stored_config(directory: str) -> GPT2Config:
    """A directory's config.json. Raises ValueError for anything but a GPT-2 in full precision."""
    settings = read_json(Path(directory) / "config.json")
    architecture = settings.get("model_type")
    if architecture is None and settings.keys() >= {"n_layer", "n_embd", "n_head"}:
        architecture = "gpt2"  # the oldest files do not say what they are
    if architecture != "gpt2":
        raise ValueError(f"a {architecture!r} model; only GPT-2 is supported")
    if settings.get("quantization_config"):
        raise ValueError("config.json: quantised weights; give the model in full precision")
    config = GPT2Config.from_dict({key: settings[key] for key in CONFIG_KEYS & settings.keys()})
    config.use_cache = True
    if min(config.n_layer, config.n_embd, config.n_head, config.n_positions, config.vocab_size) < 1:
        raise ValueError("config.json: a size below 1")
    return config


def locate(name: str) -> str:
    """A directory that holds the model: a local one, or the hub's, downloaded if need be.

    Raises ValueError.
    """
    where = f"--model_name_or_path {name}"
    directory = name if Path(name).exists() else from_hub(name)
    if not (Path(directory) / "config.json").is_file():
        is_adapter = (Path(directory) / PEFT_CONFIG).is_file()
        hint = "; it is an adapter, give it as --adapter_path" if is_adapter else ""
        raise ValueError(f"{where}: holds no config.json{hint}")
    return directory


def from_hub(name: str) -> str:
    """The hub's copy in the cache, downloaded or completed if need be.

    Raises ValueError within seconds, where transformers would retry for a minute.
    """
    with suppress(Exception):  # it fails for what is not cached, and for what is no hub id at all
        cached = snapshot_download(name, local_files_only=True, ignore_patterns="*")
        needed = [Path(cached, "config.json"), *weight_files(Path(cached))]
        if all(map(Path.exists, needed)) and matching_files(cached, VOCABULARY_FILES):
            return cached
    where = f"--model_name_or_path {name}"
    try:
        files = HfApi().model_info(name, timeout=5).siblings  # one quick request tells
        has_safetensors = any(file.rfilename.startswith(WEIGHT_FILES[0]) for file in files)
        weights = "model*.safetensors*" if has_safetensors else "pytorch_model*.bin*"
        patterns = ["config.json", METADATA, *TOKENIZER_FILES, weights]
        return snapshot_download(name, allow_patterns=patterns, ignore_patterns="*/*")
    except Exception as error:
        with suppress(Exception):
            cached = snapshot_download(name, local_files_only=True)
            logger.warning("%s: only what the cache holds of it is taken", where)
            return cached
        raise ValueError(
            f"{where}: neither a local directory nor to be had from the hub ({first_line(error)}); "
            "give --model_name_or_path a directory"
        ) from None


# ---- flags ---------------------------------------------------------------------------------------

PLAIN_LIST = str.maketrans("", "", "[]' ")  # ['a', 'b'] as a,b
SCRATCH_FLAGS = {
    name: Flag(getattr(GPT2Config(), name), at_least_one, text)
    for name, text in {
        "vocab_size": "tokens; >= 1",
        "hidden_size": "width of the residual stream; >= 1",
        "num_attention_heads": "must divide --hidden_size",
        "num_hidden_layers": "blocks; >= 1",
        "max_position_embeddings": "longest sequence, prefix included",
    }.items()
}
BASE_FLAGS = {
    "modification_type": Flag("lora", TECHNIQUES, "what trains"),
    "model_name_or_path": Flag("gpt2", nonempty, "hub id or local directory"),
    "from_scratch": Flag(False, bool, "random weights of these sizes, nothing pretrained"),
    **SCRATCH_FLAGS,
    "dropout": Flag(0.0, number(float, 0, 1), "the base model's own, while training; 0 <= p < 1"),
    "trainable_modules": Flag(
        [], names, "trained in full too, by suffix: wte,wpe,ln_1,ln_f (none)"
    ),
}


def model_flags() -> dict[str, Flag]:
    """The flags of the base model and of every technique, as the table is when this is called."""
    flags = dict(BASE_FLAGS)
    for technique in TECHNIQUES.values():
        flags |= technique.flags
    return flags


MODEL_FLAGS = model_flags()


def add_model_flags(parser: ArgumentParser) -> None:
    """Declares the model flags, a group a technique."""
    add_flags(parser, "model", BASE_FLAGS)
    for name, technique in TECHNIQUES.items():
        add_flags(parser, f"--modification_type {name}", technique.flags)


def add_flags(parser: ArgumentParser, title: str, flags: Mapping[str, Flag]) -> None:
    """Declares flags. None gets its default here, so that what was parsed is what was given."""
    group = parser.add_argument_group(title)
    for name, (default, kind, text) in flags.items():
        typed = {"type": kind} if callable(kind) else {"choices": kind}
        if kind is bool:
            typed = {"type": true_or_false, "nargs": "?", "const": True}
        shown = "" if default in (None, []) else f" ({str(default).translate(PLAIN_LIST)})"
        group.add_argument(f"--{name}", default=SUPPRESS, help=text + shown, **typed)


def command_line(settings: Settings) -> list[str]:
    """Settings as flags, as they would be given on a command line."""
    lists = (list, tuple, set, range)
    return [
        f"--{name}={','.join(map(str, value)) if isinstance(value, lists) else value}"
        for name, value in settings.items()
    ]


def check_together(args: Namespace) -> None:
    """Raises ValueError for settings that are legal each, but not together."""
    if args.prefix_projection_size and args.prefix_type != "key_value":
        raise ValueError(
            f"--prefix_projection_size {args.prefix_projection_size}: needs --prefix_type key_value"
        )


def with_defaults(args: object = None, **overrides: Any) -> Namespace:
    """All model flags: those that `args` has as attributes, the others at their defaults,
    `overrides` above both; texts or values, as a command line of them is parsed.

    Raises ValueError that names the flag, the value and what is legal; TypeError for an override
    that is no flag.
    """
    flags = model_flags()
    if unknown := overrides.keys() - flags.keys():
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    settings = {name: getattr(args, name, flag.default) for name, flag in flags.items()} | overrides
    given = {n: v for n, v in settings.items() if (v, flags[n].default) != (None, None)}
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_flags(parser, "", flags)
    try:
        return parser.parse_args(command_line(given), Namespace(**settings))
    except ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None


def idle_flags(given: Iterable[str], args: Namespace, task: str = "") -> list[str]:
    """A line for each model flag that was given and has no effect beside the others, or on a task
    of this script's own."""
    used = {"model_name_or_path", "from_scratch", *SCRATCH_FLAGS}
    if not task:
        task = f"modification_type {args.modification_type}"
        used = {*BASE_FLAGS, *TECHNIQUES[args.modification_type].flags}
        used -= {"trainable_modules"} if args.modification_type == "full" else set()
    if not args.from_scratch:
        used, task = used - SCRATCH_FLAGS.keys(), f"{task} and no --from_scratch"
    idle = [name for name in given if name in model_flags() and name not in used]
    return [f"--{name}: without effect with --{task}" for name in idle]


# ---- the script ----------------------------------------------------------------------------------


def compare(args: Namespace) -> list[Settings]:
    """What each technique trains and saves (fp32) on the base that the flags name, the largest
    first."""
    base = {name: getattr(args, name) for name in BASE_FLAGS if name != "trainable_modules"}
    rows = []
    for technique, row in TECHNIQUES.items():
        for label, paper, changes in row.compared:
            model = meta_model(with_defaults(**base | {"modification_type": technique} | changes))
            total, trainable = parameter_counts(model)
            saved = total if is_plain(technique) else trainable
            for layer in lora_layers(model).values():  # thirds are saved as one B of all rows
                saved += layer.full_B().numel() - layer.lora_B.numel()
            rows.append({
                "label": label, "paper": paper, "trainable": trainable,
                "ratio": trainable / total, "saved_mb": saved * 4e-6,
            })  # fmt: skip
    return sorted(rows, key=lambda row: -row["trainable"])


def meta_model(args: Namespace) -> GPT2LMHeadModel:
    """The modified model on PyTorch's meta device: every shape, no weight."""
    return modify(load_base(args, "meta"), args)


def table(rows: list[Settings]) -> str:
    """The rows of `compare` as text; AdamW keeps two fp32 moments a trainable parameter."""
    lines = [f"{'technique':<30}{'trainable':>14}{'ratio':>9}{'saved':>12}{'optimizer':>12}  paper"]
    for row in rows:
        counts = f"{row['label']:<30}{row['trainable']:>14,}{row['ratio']:>9.2%}"
        sizes = f"{row['saved_mb']:>9,.1f} MB{row['trainable'] * 8e-6:>9,.1f} MB"
        lines.append(f"{counts}{sizes}  {row['paper']}".rstrip())
    return "\n".join(lines)


TASK_FLAGS = {
    "compare": Flag(False, bool, "every technique side by side, no weights loaded"),
    "plot": Flag(None, nonempty, "with --compare: draw it (none)"),
    "adapter_path": Flag(None, nonempty, "a run, or what it saved in best/ or final/ (none)"),
    "merge_to": Flag(None, nonempty, "fold its LoRA into a plain GPT-2 there (none)"),
}


def run(args: Namespace, given: Iterable[str]) -> None:
    """The task that the flags name. Raises ValueError, OSError."""
    if bool(args.adapter_path) != bool(args.merge_to):
        raise ValueError("--adapter_path and --merge_to: give both, or neither")
    if (args.plot and not args.compare) or (args.compare and args.merge_to):
        raise ValueError("--compare: alone or with --plot, which needs it, and not with --merge_to")
    for line in idle_flags(
        given, args, "compare" * args.compare or "merge_to" * bool(args.merge_to)
    ):
        logger.warning(line)
    if args.merge_to:
        base = args.model_name_or_path if "model_name_or_path" in given else None
        merge_directory(args.adapter_path, args.merge_to, base)
    elif args.compare:
        print(table(rows := compare(args)))
        if args.plot:
            title = {"title": "trainable parameters", "logx": True, "legend": False}
            bars = DataFrame(rows).plot.barh("label", "trainable", **title)
            bars.figure.savefig(args.plot, bbox_inches="tight")
    else:
        print(statistics(meta_model(args)))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; bad input leaves with 2 and one line on stderr."""
    parser = ArgumentParser(
        prog="modify_llm.py",
        description="Count what a technique trains in GPT-2, compare techniques, or merge a LoRA.",
        usage=SUPPRESS,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(__doc__.splitlines()[2:5]),
    )
    add_model_flags(parser)
    add_flags(parser, "tasks (without one: count what --modification_type trains)", TASK_FLAGS)
    given = parser.parse_args(argv)
    defaults = {name: flag.default for name, flag in (model_flags() | TASK_FLAGS).items()}
    args = Namespace(**defaults | vars(given))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="ignore")  # a cp1252 terminal gets lines without the emoji
    # The coverage of each LoRA target is no news where all techniques are compared.
    level = logging.WARNING if args.compare else logging.INFO
    logging.basicConfig(level=level, stream=sys.stdout)
    transformers_logging.disable_progress_bar()
    try:
        run(args, vars(given))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `modify_llm.py | head` ends quietly
    sys.exit(main())
