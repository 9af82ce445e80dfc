"""Hand-written LoRA, bottleneck adapters, prefix tuning, selective freezing and full fine-tuning for GPT-2.

    python modify_llm.py --modification_type lora
    python modify_llm.py --compare --model_name_or_path gpt2-xl
    python modify_llm.py --adapter_path outputs/best --merge_to merged/

From a notebook: `model = apply_lora(GPT2LMHeadModel.from_pretrained("gpt2"), rank=8, alpha=16)`, then train as usual.
Each technique stands in a section of its own below: a module, and an `apply_` function that puts it into a model.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until main: what imports make stays, and to search it for garbage over and over takes a second

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

TECHNIQUES = ("lora", "adapter", "prefix", "selective", "full")
PLACEMENTS, PREFIX_TYPES = ("pfeiffer", "houlsby"), ("embedding", "key_value")
PLAIN = ("selective", "full")  # saved as plain Hugging Face models
# layers, hidden size, heads: enough to count parameters with no weights at hand
GPT2_SIZES = {
    "distilgpt2": (6, 768, 12), "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25),
}  # fmt: skip
WEIGHTS, PEFT_CONFIG, METADATA = "adapter_model.safetensors", "adapter_config.json", "modification.json"
MANIFEST = "manifest.json"
PEFT_PREFIX = "base_model.model."
SCRATCH_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
SETTINGS = {  # what must be known of a technique to load it again
    "lora": ("lora_rank", "lora_alpha", "lora_dropout"),
    "adapter": ("adapter_size", "adapter_placement"),
    "prefix": ("prefix_length", "prefix_type"),
    "selective": ("freeze_layers", "freeze_head"),
    "full": (),
}


def boolean(text: str) -> bool:
    """A flag's value: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false")
    return text.lower() == "true"


def names(text: str) -> list[str]:
    """A flag's value: names, comma-separated."""
    return [name.strip() for name in text.split(",") if name.strip()]


def layer_numbers(text: str) -> list[int]:
    """A flag's value: layer numbers and ranges, such as 0,1,4-7."""
    layers: set[int] = set()
    for part in names(text):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise argparse.ArgumentTypeError(f"{text!r}: layer numbers below 10,000 and ranges, such as 0,1,4-7")
        layers.update(range(first, last + 1))
    return sorted(layers)


SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "true|false"}


class HelpFormat(argparse.RawDescriptionHelpFormatter):
    """--max_length int instead of --max_length MAX_LENGTH."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "TEXT")


def model_flags() -> argparse.ArgumentParser:
    """The model flags, for `parents=` of the scripts that build a model; their defaults are `final_modify`'s."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("model").add_argument
    add("--modification_type", choices=TECHNIQUES, default="lora", help="what trains (%(default)s)")
    add("--model_name_or_path", default="gpt2", metavar="NAME", help="hub id or local directory (%(default)s)")
    add("--from_scratch", **SWITCH, help="random weights of the sizes below, nothing pretrained (false)")
    add("--vocab_size", type=int, default=50257, help="tokens; >= 1 (%(default)s)")
    add("--hidden_size", type=int, default=768, help="width of the residual stream; >= 1 (%(default)s)")
    add("--num_attention_heads", type=int, default=12, help="must divide --hidden_size (%(default)s)")
    add("--num_hidden_layers", type=int, default=12, help="blocks; >= 1 (%(default)s)")
    add("--max_position_embeddings", type=int, default=1024, help="longest sequence, prefix included (%(default)s)")
    add("--dropout", type=float, default=0.0, help="the base model's own, while training; 0 <= p < 1 (%(default)s)")
    add("--trainable_modules", type=names, default=[], help="trained in full too, by suffix: wte,wpe,ln_1,ln_f (none)")
    add = parser.add_argument_group("LoRA (--modification_type lora)").add_argument
    add("--lora_rank", type=int, default=4, help="rank r of A and B; >= 1 (%(default)s)")
    add("--lora_alpha", type=float, default=8.0, help="the update is scaled by alpha / r; > 0 (%(default)s)")
    add("--lora_dropout", type=float, default=0.0, help="on A's input, while training; 0 <= p < 1 (%(default)s)")
    add("--lora_target_modules", type=names, default=["c_attn", "c_proj", "c_fc"],
        help="by suffix; c_attn.q, .k and .v are thirds of the fused projection (c_attn,c_proj,c_fc)")  # fmt: skip
    add = parser.add_argument_group("bottleneck adapters (--modification_type adapter)").add_argument
    add("--adapter_size", type=int, default=64, help="width of the bottleneck; >= 1 (%(default)s)")
    add("--adapter_placement", choices=PLACEMENTS, default="pfeiffer", help="one a block, or two (%(default)s)")
    add = parser.add_argument_group("prefix tuning (--modification_type prefix)").add_argument
    add("--prefix_length", type=int, default=50, help="virtual tokens; >= 1 (%(default)s)")
    add("--prefix_type", choices=PREFIX_TYPES, default="embedding", help="at the input, or in each layer (%(default)s)")
    add("--prefix_projection_size", type=int, default=0, help="key_value only: width of an MLP; 0: none (%(default)s)")
    add = parser.add_argument_group("selective freezing (--modification_type selective)").add_argument
    add("--freeze_layers", type=layer_numbers, default=[0, 1, 2, 3], help="from 0; ranges such as 0-5 (0,1,2,3)")
    add("--freeze_head", **SWITCH, help="also freeze the tied head and the final LayerNorm (false)")
    return parser


def model_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the model flags, a line each; nothing is loaded."""
    choices = {"modification_type": TECHNIQUES, "adapter_placement": PLACEMENTS, "prefix_type": PREFIX_TYPES}
    checks = [(getattr(args, name) in legal, name, f"one of {', '.join(legal)}") for name, legal in choices.items()]
    positive = (*SCRATCH_SIZES, "lora_rank", "adapter_size", "prefix_length")
    checks += [(getattr(args, name) >= 1, name, "at least 1") for name in positive]
    checks += [(0 <= getattr(args, name) < 1, name, "0 or more, below 1") for name in ("dropout", "lora_dropout")]
    checks += [(0 < args.lora_alpha < math.inf, "lora_alpha", "above 0")]
    checks += [(args.prefix_projection_size >= 0, "prefix_projection_size", "0 (none) or more")]
    problems = [f"--{name} {getattr(args, name)}: {legal}" for fine, name, legal in checks if not fine]
    if args.model_name_or_path == "":
        problems.append("--model_name_or_path: an empty name")
    if args.num_attention_heads >= 1 and args.hidden_size % args.num_attention_heads:
        problems.append(f"--hidden_size {args.hidden_size}: not a multiple of {args.num_attention_heads} heads")
    if args.prefix_projection_size > 0 and args.prefix_type != "key_value":
        problems.append(f"--prefix_projection_size {args.prefix_projection_size}: needs --prefix_type key_value")
    return problems


def idle_flags(args: argparse.Namespace, default: Callable[[str], Any]) -> list[str]:
    """A line for each flag that was given and that the chosen technique does not look at."""
    technique, lines = args.modification_type, []
    owners = {"lora": "lora", "adapter": "adapter", "prefix": "prefix", "freeze": "selective"}
    for name in [name for name, value in vars(args).items() if value != default(name)]:
        owner = owners.get(name.partition("_")[0], technique)
        if owner != technique:
            lines.append(f"--{name}: without effect, it belongs to --modification_type {owner}, this is {technique}")
        elif name in SCRATCH_SIZES and not args.from_scratch:
            lines.append(f"--{name}: without effect without --from_scratch")
        elif name == "trainable_modules" and technique == "full":
            lines.append("--trainable_modules: without effect, --modification_type full trains every module")
    return lines


def with_defaults(args: object = None, **overrides: Any) -> argparse.Namespace:
    """All model flags: those that `args` has as attributes, the others at their defaults, `overrides` above both.

    Raises ValueError for a value out of range, TypeError for an override that is no flag.
    """
    settings = model_flags().parse_args([])
    if unknown := overrides.keys() - vars(settings):
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    for name in vars(settings):
        setattr(settings, name, overrides.get(name, getattr(args, name, getattr(settings, name))))
    for name, parse in (("trainable_modules", names), ("lora_target_modules", names), ("freeze_layers", layer_numbers)):
        if isinstance(value := getattr(settings, name), str):
            try:
                setattr(settings, name, parse(value))
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"--{name} {error}") from None
    if problems := model_problems(settings):
        raise ValueError("; ".join(problems))
    return settings


# ---- the base model --------------------------------------------------------------------------------------------------


def read_config(args: argparse.Namespace) -> GPT2Config:
    """The base model's configuration, from the flags, a local directory or the table of published sizes."""
    if args.from_scratch:
        return GPT2Config(
            vocab_size=args.vocab_size,
            n_embd=args.hidden_size,
            n_head=args.num_attention_heads,
            n_layer=args.num_hidden_layers,
            n_positions=args.max_position_embeddings,
            bos_token_id=args.vocab_size - 1,  # GPT-2's end-of-text is its last token
            eos_token_id=args.vocab_size - 1,
        )
    name = args.model_name_or_path
    size = GPT2_SIZES.get(name.removeprefix("openai-community/").removeprefix("distilbert/"))
    if size and not Path(name).exists():
        return GPT2Config(n_layer=size[0], n_embd=size[1], n_head=size[2])
    path = locate(name)
    architecture = read_json(Path(path) / "config.json").get("model_type")
    if architecture != "gpt2":
        raise ValueError(f"--model_name_or_path {name}: a {architecture!r} model; only GPT-2 is supported")
    try:
        config = GPT2Config.from_pretrained(path)
        if min(config.n_layer, config.n_embd, config.n_head, config.n_positions, config.vocab_size) < 1:
            raise ValueError("a size below 1")
        with torch.device("meta"):
            GPT2LMHeadModel(config)  # tells, in errors of any type, what cannot be built
    except Exception as error:
        raise ValueError(f"--model_name_or_path {name}: config.json: {first_line(error)}") from None
    return config


def locate(name: str) -> str:
    """A directory that holds the model: a local one, or the hub's, downloaded if need be.

    Raises ValueError within seconds, where transformers would retry for a minute without a network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    ways_out = "give --model_name_or_path a local directory, or --from_scratch"
    if Path(name).exists():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"--model_name_or_path {name}: holds no config.json; {ways_out}")
        return name
    files = ["*.json", "*.txt", "*.safetensors"]
    with suppress(Exception):  # it fails for what is not cached, and for what is no hub id at all
        return snapshot_download(name, allow_patterns=files, local_files_only=True)
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=5)  # one quick request tells
        return snapshot_download(name, allow_patterns=files)
    except Exception as error:
        neither = f"neither a local directory nor to be had from the hub ({first_line(error)})"
        raise ValueError(f"--model_name_or_path {name}: {neither}; {ways_out}") from None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def load_base(args: argparse.Namespace) -> GPT2LMHeadModel:
    """The base model in fp32, all of it trainable, its own dropouts set to --dropout.

    `model.base_path` is where its weights lie (None: random). Raises ValueError; weights are never filled in quietly.
    """
    config = read_config(args)  # refuses what is no GPT-2 before any weight is read
    if args.from_scratch:
        logger.warning("RANDOM WEIGHTS: --from_scratch initialises the base model at random, nothing is pretrained")
        model, path, name = GPT2LMHeadModel(config), None, None
    else:
        name = args.model_name_or_path
        path = locate(name)
        model = load_weights(path, f"--model_name_or_path {name}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = args.dropout
    model.base_path, model.base_name, model.base_fingerprint = path, name, fingerprint(model)
    return model


def load_weights(path: str, where: str) -> GPT2LMHeadModel:
    """GPT2LMHeadModel.from_pretrained, with ValueError for each weight that it would only report, or not even see."""
    spoken = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of missing weights is an error here, in one line
    try:
        options = {"local_files_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, loading = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{where}: does not load: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(spoken)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{where}: its weights lack {missing[0]} ({len(missing)} tensors in all)")
    if misshapen := sorted(key for key, *_ in loading["mismatched_keys"]):
        raise ValueError(f"{where}: {misshapen[0]} has another shape than config.json says")
    if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise ValueError(f"{where}: {broken[0]} holds NaN or infinite values")
    return model


def fingerprint(model: nn.Module) -> str:
    """Tells one base model from another: a hash of the first values of each of its parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_tied(model: GPT2LMHeadModel) -> bool:
    return getattr(model.lm_head, "weight", None) is model.transformer.wte.weight


def start_modification(model: GPT2LMHeadModel, technique: str, **settings: Any) -> None:
    """Freezes the whole model and notes what is about to be done to it, for saving and loading."""
    if done := getattr(model, "modification", None):
        raise ValueError(f"the model carries {done['modification_type']} already; load a fresh base")
    model.requires_grad_(False)
    model.modification = {"modification_type": technique, **settings, "trainable_modules": []}


def modules_named(model: nn.Module, suffix: str) -> dict[str, nn.Module]:
    """The modules whose dotted name is, or ends in, `suffix`."""
    return {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{suffix}")}


def train_modules(model: GPT2LMHeadModel, suffixes: Iterable[str]) -> None:
    """--trainable_modules: trains whole modules besides the technique's own, by suffix of their names."""
    for suffix in suffixes:
        found = {n: m for n, m in modules_named(model, suffix).items() if ".original_layer" not in n}
        if not found:
            legal = sorted({name.split(".")[-1] for name, m in model.named_modules() if list(m.parameters(False))})
            raise ValueError(f"--trainable_modules {suffix}: matches nothing; the model has {', '.join(legal)}")
        for name, module in found.items():
            if any(isinstance(part, LoRALayer) for part in module.modules()):
                raise ValueError(f"--trainable_modules {suffix}: {name} is wrapped by LoRA; choose one of the two")
            module.requires_grad_(True)
        model.modification["trainable_modules"].append(suffix)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


class LoRAProduct(torch.autograd.Function):
    """x W + b + s (x A^T) B^T with W (in, out) and b frozen, for a LoRALayer whose dropout is off.

    The same sum as written out with autograd, but the update is added in place, forward and backward, and the products
    of rank r are ordered so that nothing larger than what goes in or comes out is made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        shape, device = x.shape, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, W, A, B = (tensor.to(dtype) for tensor in (x.flatten(0, -2), W, A, B))
        h = x @ W if b is None else torch.addmm(b.to(dtype), x, W)  # (tokens, out)
        low_rank = (x @ A.t()) * scaling  # (tokens, r)
        h.addmm_(low_rank, B.t())
        ctx.save_for_backward(x, W, A, B, low_rank)
        ctx.scaling = scaling
        return h.view(*shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, low_rank = ctx.saved_tensors
        shape, grad = grad.shape, grad.flatten(0, -2)
        B_grad = (low_rank.t() @ grad).t()
        low_rank_grad = (grad @ B) * ctx.scaling
        A_grad = low_rank_grad.t() @ x
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ W.t()).addmm_(low_rank_grad, A).view(*shape[:-1], -1)
        return x_grad, None, None, A_grad, B_grad, None


class LoRALayer(nn.Module):
    """h = W0 x + (alpha / r) B A x, where only A and B train (Hu et al., 2021, section 4.1, equation 3).

    A, `lora_A` (r, in_features), starts as in loralib (Kaiming uniform, a = sqrt(5)), and B, `lora_B`
    (out_features, r), at zero, so that B A = 0 when training starts. `thirds`, such as "qv", adapts single parts of
    GPT-2's fused query-key-value projection: each has an A and a B of its own, stacked in n x r rows of `lora_A` and
    n x (out_features / 3) rows of `lora_B`. `rslora` scales by alpha / sqrt(r) (Kalajdzievski, 2023).
    """

    def __init__(
        self, original_layer: Conv1D | nn.Linear, rank: int, alpha: float, dropout: float = 0.0, thirds: str = "",
        rslora: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        weight = original_layer.weight
        in_features, out_features = weight.shape if isinstance(original_layer, Conv1D) else weight.shape[::-1]
        parts = len(thirds) or 1
        self.original_layer = original_layer
        self.lora_A = nn.Parameter(torch.empty(parts * rank, in_features, device=weight.device))
        rows = parts * out_features // 3 if thirds else out_features
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.thirds, self.merged = thirds, False

    def full_B(self) -> Tensor:
        """(out_features, rows of A): B itself, or each third's B in its own block, zeros elsewhere."""
        if not self.thirds:
            return self.lora_B
        n = len(self.thirds)
        rows = torch.block_diag(*self.lora_B.chunk(n)).chunk(n)  # each (out_features / 3, n x r)
        adapted = dict(zip(self.thirds, rows, strict=True))
        return torch.cat([adapted.get(third, torch.zeros_like(rows[0])) for third in "qkv"])

    def forward(self, x: Tensor) -> Tensor:
        original = self.original_layer
        if self.merged:
            return original(x)
        plain = original.weight.requires_grad or (original.bias is not None and original.bias.requires_grad)
        if plain or (self.training and self.dropout.p):
            return original(x) + self.scaling * F.linear(F.linear(self.dropout(x), self.lora_A), self.full_B())
        W = original.weight if isinstance(original, Conv1D) else original.weight.t()
        return LoRAProduct.apply(x, W, original.bias, self.lora_A, self.full_B(), self.scaling)

    def get_delta_weight(self) -> Tensor:
        """(alpha / r) B A in fp32, laid out as the original weight: Conv1D's is transposed."""
        delta = self.full_B().float() @ self.lora_A.float() * self.scaling
        return delta.t() if isinstance(self.original_layer, Conv1D) else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into the original weight, so that inference costs nothing more (section 4.1)."""
        if self.merged:
            raise RuntimeError("merged already: merging twice would add the update twice")
        self.original_layer.weight += self.get_delta_weight().to(self.original_layer.weight.dtype)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            raise RuntimeError("not merged: there is no update to take out")
        self.original_layer.weight -= self.get_delta_weight().to(self.original_layer.weight.dtype)
        self.merged = False


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def match_targets(model: GPT2LMHeadModel, targets: Iterable[str]) -> dict[str, str]:
    """{layer name: its adapted thirds, "" for the whole layer} of the LoRA targets. Logs how many each one matched."""
    matched: dict[str, str] = {}
    for target in targets:
        where = f"--lora_target_modules {target}"
        third = re.fullmatch(r"((?:.*\.)?c_attn)\.([qkv])", target)
        suffix, part = third.groups() if third else (target, "")
        found = modules_named(model, suffix)
        if not found:
            layers = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, Conv1D | nn.Linear)}
            raise ValueError(f"{where}: matches nothing; the model has {', '.join(sorted(layers - {'lm_head'}))}")
        for name, module in found.items():
            if not isinstance(module, Conv1D | nn.Linear):
                raise ValueError(f"{where}: {name} is a {type(module).__name__}; LoRA wraps Conv1D and Linear")
            if module is model.lm_head and is_tied(model):
                raise ValueError(f"{where}: the head shares its weight with the token embeddings, LoRA would part them")
            if name in matched and (not part or not matched[name] or part in matched[name]):
                raise ValueError(f"{where}: {name} is matched by another target too")
            matched[name] = "".join(sorted(matched.get(name, "") + part, key="qkv".index))
        logger.info("LoRA target %s: %d layers", target, len(found))
    return matched


def apply_lora(
    model: GPT2LMHeadModel, rank: int = 4, alpha: float = 8.0, *, dropout: float = 0.0,
    target_modules: Iterable[str] = ("c_attn", "c_proj", "c_fc"), trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Wraps every Conv1D or Linear layer that a target names in a LoRALayer, in place, and freezes all else.

    target_modules: suffixes of layer names. The paper adapts the query and value projections alone (section 4.2):
    ("c_attn.q", "c_attn.v"). Raises ValueError for a target that matches nothing, or no layer of these types.
    """
    settings = {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    with_defaults(**settings)  # raises, if one is out of range
    targets = list(target_modules)
    if not targets:
        raise ValueError("--lora_target_modules: names no layer")
    matched = match_targets(model, targets)
    start_modification(model, "lora", **settings, lora_target_modules=targets)
    for name, thirds in matched.items():
        model.set_submodule(name, LoRALayer(model.get_submodule(name), rank, alpha, dropout, thirds))
    train_modules(model, trainable_modules)
    return model


def merge_lora(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Folds every LoRA update into its layer and takes the wrappers out: a plain GPT2LMHeadModel remains."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model holds no LoRA to merge")
    for name, layer in layers.items():
        if not layer.merged:
            layer.merge()
        model.set_submodule(name, layer.original_layer)
    del model.modification
    return model


# ---- bottleneck adapters ---------------------------------------------------------------------------------------------


class BottleneckAdapter(nn.Module):
    """h <- h + W_up f(W_down h), a bottleneck with a skip connection (Houlsby et al., 2019, section 2.1).

    GPT-2 ends each sub-layer with a dropout, right before the residual add: there the paper puts its adapter, so the
    adapter takes that dropout in, and no weight of the base is renamed. W_up starts at zero, so that the modified
    model starts as the original (the paper's near-identity initialisation). f is GELU, as in GPT-2 itself.
    """

    def __init__(self, original_layer: nn.Dropout, hidden_size: int, adapter_size: int, device: torch.device) -> None:
        super().__init__()
        self.original_layer = original_layer
        self.down_proj = nn.Linear(hidden_size, adapter_size, device=device)
        self.up_proj = nn.Linear(adapter_size, hidden_size, device=device)
        nn.init.normal_(self.down_proj.weight, std=0.02)
        nn.init.zeros_(self.down_proj.bias)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, h: Tensor) -> Tensor:  # (batch, length, hidden)
        h = self.original_layer(h)
        bottleneck = F.gelu(F.linear(h, *self.cast(self.down_proj, h)), approximate="tanh")  # (batch, length, size)
        return h + F.linear(bottleneck, *self.cast(self.up_proj, h))

    @staticmethod
    def cast(linear: nn.Linear, h: Tensor) -> tuple[Tensor, Tensor]:
        return linear.weight.to(h.dtype), linear.bias.to(h.dtype)


def apply_adapters(
    model: GPT2LMHeadModel, adapter_size: int = 64, *, placement: str = "pfeiffer",
    trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Puts bottleneck adapters into every block, in place, and freezes all else.

    placement: "houlsby" has one after the attention and one after the feed-forward sub-layer (Houlsby et al., 2019,
    figure 2), "pfeiffer" only the latter (Pfeiffer et al., 2020, AdapterFusion, section 3). Houlsby's runs train the
    LayerNorms too: trainable_modules=("ln_1", "ln_2", "ln_f").
    """
    settings = {"adapter_size": adapter_size, "adapter_placement": placement}
    with_defaults(**settings)  # raises, if one is out of range
    start_modification(model, "adapter", **settings)
    for block in model.transformer.h:
        build = (model.config.n_embd, adapter_size, block.ln_1.weight.device)
        if placement == "houlsby":
            block.attn.resid_dropout = BottleneckAdapter(block.attn.resid_dropout, *build)
        block.mlp.dropout = BottleneckAdapter(block.mlp.dropout, *build)
    train_modules(model, trainable_modules)
    return model


# ---- prefix tuning ---------------------------------------------------------------------------------------------------


class PromptEmbedding(nn.Module):
    """Virtual tokens at the model's input, trained as embeddings (Lester et al., 2021, section 2)."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)  # (prefix length, hidden)

    def prompt_embeddings(self) -> Tensor:
        return self.embedding


class KeyValuePrefix(nn.Module):
    """Virtual tokens as keys and values of every layer (Li & Liang, 2021, section 4.2).

    Columns: key of layer 0, value of layer 0, key of layer 1, ..., each with its heads side by side.
    With a projection, P = MLP(P') as in section 4.3: embedding (prefix length, hidden) -> tanh -> all columns.
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
        if device.type != "meta":  # solve the last layer for the columns, so that this start is a real one too
            with torch.no_grad():
                nn.init.normal_(self.mlp[0].weight, std=1 / tokens.std().item() / math.sqrt(hidden_size))
                features = self.mlp[:2](tokens)
                self.mlp[2].bias.copy_(columns.mean(0))
                solution = torch.linalg.pinv(features, rtol=1e-3) @ (columns - columns.mean(0))
                self.mlp[2].weight.copy_(solution.t())

    def prompt_embeddings(self) -> Tensor:
        return self.embedding if self.mlp is None else self.mlp(self.embedding)

    def fill(self, cache: DynamicCache, batch_size: int, config: GPT2Config, dtype: torch.dtype) -> DynamicCache:
        """Puts the prefix's keys and values, each (batch, heads, prefix length, head size), into an empty cache."""
        columns = self.prompt_embeddings().to(dtype)
        layers = columns.unflatten(1, (config.n_layer, 2, config.n_head, -1)).permute(1, 2, 3, 0, 4)
        for i, key_value in enumerate(layers):  # (2, heads, prefix length, head size)
            key, value = key_value[:, None].expand(-1, batch_size, -1, -1, -1)
            cache.update(key, value, i)
        return cache


class PrefixedGPT2(GPT2Model):
    """GPT2Model that sees `self.prefix` before its text: in training, in evaluation and at generate()'s first step.

    Text positions start at the prefix's length, and the attention mask grows by it. What an embedding prefix adds to
    hidden states and attentions is cut off again, so that logits and labels align with the text.
    """

    prefix: PromptEmbedding | KeyValuePrefix

    def forward(
        self, input_ids: Tensor | None = None, past_key_values: DynamicCache | None = None,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        batch_size, length, _ = inputs_embeds.shape
        prefix_length = len(self.prefix.embedding)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0  # 0: the prefix is still to come
        packed = "packing" in kwargs  # train_llm.py's rows, one behind the other, each with positions from 0 on
        if not packed and (total := max(seen, prefix_length) + length) > self.config.n_positions:
            raise ValueError(f"prefix and text make {total} tokens; the model has {self.config.n_positions} positions")
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError("a prefix needs a 2-D attention mask (no static cache)")
            attention_mask = torch.cat([attention_mask.new_ones(batch_size, prefix_length), attention_mask], dim=1)
        if position_ids is not None:
            position_ids = position_ids + prefix_length
        embedding = isinstance(self.prefix, PromptEmbedding) and not seen
        if embedding:
            virtual = self.prefix.embedding.to(inputs_embeds.dtype).expand(batch_size, -1, -1)
            inputs_embeds = torch.cat([virtual, inputs_embeds], dim=1)  # (batch, prefix length + length, hidden)
            if position_ids is not None:
                first = torch.arange(prefix_length, device=position_ids.device).expand(len(position_ids), -1)
                position_ids = torch.cat([first, position_ids], dim=1)
        elif not seen:
            if self.training and self.gradient_checkpointing:
                raise ValueError("gradient checkpointing drops the cache that carries a key_value prefix")
            autocast = torch.is_autocast_enabled(self.device.type)
            dtype = torch.get_autocast_dtype(self.device.type) if autocast else self.wte.weight.dtype
            empty = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            past_key_values = self.prefix.fill(empty, batch_size, self.config, dtype)
        output = super().forward(
            None, past_key_values, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if embedding:
            output.last_hidden_state = output.last_hidden_state[:, prefix_length:]
            for name in {"hidden_states", "attentions"} & output.keys():  # a layer that was not asked for is None
                output[name] = tuple(None if x is None else x[..., prefix_length:, :] for x in output[name])
        return output


def apply_prefix(
    model: GPT2LMHeadModel, prefix_length: int = 50, *, prefix_type: str = "embedding", projection_size: int = 0,
    init_ids: Iterable[int] | None = None, trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Puts `prefix_length` trainable virtual tokens before every text, in place, and freezes all else.

    prefix_type: "embedding" or "key_value". projection_size: key_value's reparametrisation (0: none).
    init_ids: the real tokens to start from, as Li & Liang find essential (section 7.4); by default the most frequent
    ones: a byte-level BPE numbers its merges, from 256 on, in that order.
    """
    config = model.config
    settings = {"prefix_length": prefix_length, "prefix_type": prefix_type, "prefix_projection_size": projection_size}
    with_defaults(**settings)  # raises, if one is out of range
    if prefix_length >= config.n_positions:
        raise ValueError(f"--prefix_length {prefix_length}: leaves no room for text in {config.n_positions} positions")
    start_modification(model, "prefix", **settings)
    start, wte = list(init_ids or range(256, 256 + prefix_length)), model.transformer.wte.weight
    ids = [start[i % len(start)] % config.vocab_size for i in range(prefix_length)]  # too few: over again
    with torch.no_grad():
        tokens = wte[ids].float()  # (prefix length, hidden), a copy
        if prefix_type == "embedding":
            prefix: nn.Module = PromptEmbedding(tokens)
        else:
            columns = key_value_columns(model, torch.tensor(ids, device=wte.device))
            tokens += model.transformer.wpe.weight[:prefix_length]  # a token's place tells it from its repetition
            prefix = KeyValuePrefix(columns, tokens, projection_size)
    with torch.device("meta"):  # transformers notes what outputs a class can give when the first one is built
        PrefixedGPT2(GPT2Config(n_layer=0))
    model.transformer.prefix = prefix
    model.transformer.__class__ = PrefixedGPT2  # as torch's own parametrizations do; every key keeps its name
    train_modules(model, trainable_modules)
    return model


def key_value_columns(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """(tokens, layers * 2 * hidden) fp32: the keys and values that the tokens produce in every layer."""
    training = model.training
    model.eval()
    cache = model.transformer(ids[None], use_cache=True).past_key_values
    model.train(training)
    states = [state[0].transpose(0, 1).flatten(1) for layer in cache.layers for state in (layer.keys, layer.values)]
    return torch.cat(states, dim=1).float()


# ---- selective freezing and full fine-tuning -------------------------------------------------------------------------


def apply_selective_freezing(
    model: GPT2LMHeadModel, freeze_layers: Iterable[int] = (0, 1, 2, 3), *, freeze_head: bool = False,
    trainable_modules: Iterable[str] = (),
) -> GPT2LMHeadModel:  # fmt: skip
    """Trains the blocks that `freeze_layers` leaves, and the head and final LayerNorm unless `freeze_head`.

    GPT-2's head is tied to the token embeddings, so these train with it, and the backward pass then reaches the
    model's input; with `freeze_head` it stops below the lowest trainable block. Position embeddings stay frozen.
    """
    freeze_layers, layers = sorted(set(freeze_layers)), len(model.transformer.h)
    if outside := [layer for layer in freeze_layers if not 0 <= layer < layers]:
        raise ValueError(f"--freeze_layers {outside[0]}: the model has layers 0 to {layers - 1}")
    start_modification(model, "selective", freeze_layers=freeze_layers, freeze_head=freeze_head)
    for i, block in enumerate(model.transformer.h):
        block.requires_grad_(i not in freeze_layers)
    model.lm_head.requires_grad_(not freeze_head)
    model.transformer.ln_f.requires_grad_(not freeze_head)
    train_modules(model, trainable_modules)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("--freeze_layers with --freeze_head: nothing is left to train")
    return model


def apply_full_finetuning(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Trains every parameter."""
    start_modification(model, "full")
    model.requires_grad_(True)
    return model


# ---- all of them -----------------------------------------------------------------------------------------------------


def modify(model: GPT2LMHeadModel, args: argparse.Namespace) -> GPT2LMHeadModel:
    """Applies the technique that the flags name, in place."""
    more = {"trainable_modules": args.trainable_modules}
    match args.modification_type:
        case "lora":
            more |= {"dropout": args.lora_dropout, "target_modules": args.lora_target_modules}
            return apply_lora(model, args.lora_rank, args.lora_alpha, **more)
        case "adapter":
            return apply_adapters(model, args.adapter_size, placement=args.adapter_placement, **more)
        case "prefix":
            more |= {"prefix_type": args.prefix_type, "projection_size": args.prefix_projection_size}
            return apply_prefix(model, args.prefix_length, **more)
        case "selective":
            return apply_selective_freezing(model, args.freeze_layers, freeze_head=args.freeze_head, **more)
    return apply_full_finetuning(model)


def final_modify(args: object = None, **overrides: Any) -> GPT2LMHeadModel:
    """The base model with a technique applied, fp32, called like any GPT2LMHeadModel.

    args: any object with the model flags as attributes (an argparse Namespace, a dataclass); what it lacks takes the
    flag's default, and keyword arguments stand above both: `final_modify(modification_type="prefix")`.
    Raises ValueError that names the flag, its value and what is legal.
    """
    settings = with_defaults(args, **overrides)
    return modify(load_base(settings), settings)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all parameters, trainable ones); tied weights count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def statistics(model: GPT2LMHeadModel) -> str:
    """The model's parameter counts and what trains, a line a parameter."""
    total, trainable = parameter_counts(model)
    lines = ["📊 Final Parameter Statistics:"]
    lines += [f"   Total parameters: {total:,}", f"   Trainable parameters: {trainable:,}"]
    lines += [f"   Trainable ratio: {trainable / total:.4f} ({trainable / total:.2%})", ""]
    lines += ["🔍 Parameter Trainability Status:"]
    for name, parameter in model.named_parameters():
        status = "✅ {}: Trainable ({:,} params)" if parameter.requires_grad else "❄️  {}: Frozen ({:,} params)"
        lines.append("  " + status.format(name, parameter.numel()))
    if is_tied(model):
        lines.append("  🔗 lm_head.weight: tied to transformer.wte.weight")
    return "\n".join(lines)


# ---- saving and loading ----------------------------------------------------------------------------------------------


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file and reads it back."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    check_written(path, tensors)


def check_written(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file counts only when every tensor in it returns as it was; raises OSError."""
    for name, tensor in load_file(path).items():
        if not torch.equal(tensor, tensors[name]):
            raise OSError(f"{path}: {name} does not read back as it was written")


def save_trained(model: GPT2LMHeadModel, directory: str | Path) -> None:
    """Writes what was trained: the PEFT layout for LoRA and prefixes, a plain Hugging Face model for selective and
    full, safetensors of our own for adapters; `modification.json` beside each. `load_trained` reads all of them.

    Frozen weights of plain models are taken from the base model's own files, at their precision.
    """
    directory, settings = Path(directory), dict(model.modification)
    directory.mkdir(parents=True, exist_ok=True)
    technique, state = settings["modification_type"], trainable_state(model)
    if technique in PLAIN:
        save_plain(model, state, directory)
    elif technique == "adapter":
        write_tensors(state, directory / "adapter.safetensors")
    elif technique == "lora":
        write_as_peft(model, *lora_as_peft(model, state), directory)
    else:
        embeddings = {"prompt_embeddings": model.transformer.prefix.prompt_embeddings()}
        write_as_peft(model, embeddings, prefix_as_peft(model), directory)
        if extra := {name: tensor for name, tensor in state.items() if "transformer.prefix." not in name}:
            write_tensors(extra, directory / "trainable_modules.safetensors")  # PEFT has no place for them
        settings["prefix_projection_size"] = 0  # computed out
    config = model.config
    settings["base_config"] = {key: getattr(config, key) for key in ("n_layer", "n_embd", "n_head", "vocab_size")}
    settings["base_model_name_or_path"] = base_reference(model, directory)
    settings["base_fingerprint"] = getattr(model, "base_fingerprint", None)
    write_json(directory / METADATA, settings)


def base_reference(model: GPT2LMHeadModel, directory: Path) -> str | None:
    """The base as it was named; one that lies beside the result by its relative path, so that both can move."""
    name = getattr(model, "base_name", None)
    if name and Path(name).is_dir():
        base = Path(name).resolve()
        return os.path.relpath(base, directory.resolve()) if base.parent == directory.resolve().parent else str(base)
    return name


def write_as_peft(model: GPT2LMHeadModel, tensors: dict[str, Tensor], config: dict, directory: Path) -> None:
    """PEFT's two files; without a task_type PEFT would load a prefix, and then ignore it."""
    write_tensors(tensors, directory / WEIGHTS)
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": getattr(model, "base_name", None)}
    write_json(directory / PEFT_CONFIG, {**config, **common, "inference_mode": True})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_plain(model: GPT2LMHeadModel, state: dict[str, Tensor], directory: Path) -> None:
    """A plain Hugging Face model directory: the base as its files hold it, with the tensors of `state` put in."""
    if base_path := getattr(model, "base_path", None):
        plain = GPT2LMHeadModel.from_pretrained(base_path, dtype="auto", local_files_only=True)
        put_tensors(plain, state, directory)
    else:
        plain = model
    plain.save_pretrained(directory)
    check_written(directory / "model.safetensors", {name: t.cpu() for name, t in plain.state_dict().items()})


def lora_as_peft(model: GPT2LMHeadModel, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """The tensors and configuration of PEFT's LoRA layout.

    n thirds of a fused projection, each of rank r, have no name in PEFT; they are exactly one LoRA of rank n r with the
    same scaling, A stacked and B in blocks. What differs from layer to layer goes into PEFT's patterns.
    """
    layers, settings = lora_layers(model), model.modification
    rank, alpha = settings["lora_rank"], settings["lora_alpha"]
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.full_B()
        ranks[name], alphas[name] = len(layer.lora_A), layer.scaling * len(layer.lora_A)
    others = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    if "transformer.wte.weight" in others and is_tied(model):  # with wte alone, PEFT would keep the old head
        others["lm_head.weight"] = others["transformer.wte.weight"].clone()
    tensors |= {PEFT_PREFIX + name.replace(".original_layer", ".base_layer"): t for name, t in others.items()}
    whole = {name.rpartition(".")[0] for name in others if not name.endswith(".bias")}
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    bias = "lora_only" if any(".original_layer" in name for name in others) else "none"
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": settings["lora_dropout"],
        "target_modules": sorted(layers),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if not math.isclose(a, alpha)},
        "fan_in_fan_out": all(isinstance(layer.original_layer, Conv1D) for layer in layers.values()),
        "bias": "all" if biases <= others.keys() else bias,
        "modules_to_save": sorted(whole) or None,
    }
    return tensors, config


def prefix_as_peft(model: GPT2LMHeadModel) -> dict:
    """The configuration of PEFT's PROMPT_TUNING or PREFIX_TUNING layout."""
    config, settings = model.config, model.modification
    key_value = settings["prefix_type"] == "key_value"
    return {
        "peft_type": "PREFIX_TUNING" if key_value else "PROMPT_TUNING",
        "num_virtual_tokens": settings["prefix_length"],
        "token_dim": config.n_embd,
        "num_attention_heads": config.n_head,
        "num_layers": config.n_layer,
        "num_transformer_submodules": 1,
        **({"prefix_projection": False} if key_value else {"prompt_tuning_init": "RANDOM"}),
    }


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises ValueError for one that is damaged or holds NaN."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
    return tensors


@torch.no_grad()
def put_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path, required: Iterable[str] = ()) -> None:
    """Copies tensors into the parameters of these names.

    Raises ValueError for one that has no place or another shape there, and for a required one that is not given.
    """
    if missing := set(required) - tensors.keys():
        raise ValueError(f"{path}: lacks {min(missing)}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in parameters:
            raise ValueError(f"{path}: {name} has no place in this model")
        if parameters[name].shape != tensor.shape:
            expected = tuple(parameters[name].shape)
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model's {expected}")
        parameters[name].copy_(tensor)


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_hash(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def verify_directory(path: Path, links: bool = False) -> None:
    """Raises ValueError unless every file is there as its manifest says; links: the hub's cache is made of them."""
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("manifest_sha256") != manifest_hash(files):
        raise ValueError(f"{path}: manifest.json is damaged")
    present = {file.name for file in path.iterdir() if file.is_file() and (links or not file.is_symlink())}
    for name, expected in files.items():
        if name not in present:  # a path that leads elsewhere is not among these names
            raise ValueError(f"{path}: {name} is missing")
        if file_hash(path / name) != expected:
            raise ValueError(f"{path}: {name} is damaged (its checksum differs)")


def load_trained(
    directory: str | Path, model_name_or_path: str | None = None, *, dropout: float = 0.0
) -> GPT2LMHeadModel:
    """What a run saved in best/ or final/, on its base model, ready to use or to train on; a PEFT-made LoRA too.

    model_name_or_path: the base; by default the one that the directory names. Raises ValueError.
    """
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        try:
            verify_directory(directory, links=True)
        except ValueError as error:
            raise ValueError(f"{error}; if you changed it on purpose, delete {MANIFEST}") from None
    settings, source = trained_settings(directory)
    try:
        args = with_defaults(argparse.Namespace(**settings), from_scratch=False, dropout=dropout)
        technique = args.modification_type
        if lacking := [name for name in ("modification_type", *SETTINGS[technique]) if name not in settings]:
            raise ValueError(f"lacks {lacking[0]}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None
    base = str(directory) if technique in PLAIN else model_name_or_path or settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{directory}: does not name its base model; give --model_name_or_path")
    args.model_name_or_path = base
    model = load_base(args)
    check_base(model, settings, directory, asked_for=bool(model_name_or_path))
    if technique == "lora":
        try:
            load_lora(model, directory, args, settings)
        except (TypeError, AttributeError, re.error) as error:  # a field of another type, a pattern that is none
            raise ValueError(f"{directory / PEFT_CONFIG}: not as PEFT writes it: {error}") from error
        return model
    modify(model, args)
    if technique == "adapter":
        path = directory / "adapter.safetensors"
        put_tensors(model, read_tensors(path), path, required=trainable_state(model))
    elif technique == "prefix":
        load_prefix(model, directory)
    return model


def trained_settings(directory: Path) -> tuple[dict, Path]:
    """(settings, the file that they stand in) of what a run of ours saved, or PEFT."""
    if (directory / METADATA).is_file():
        settings, source = read_json(directory / METADATA), directory / METADATA
    elif (directory / PEFT_CONFIG).is_file():
        settings, source = peft_settings(directory), directory / PEFT_CONFIG
    else:
        raise ValueError(f"{directory}: holds neither {METADATA} nor {PEFT_CONFIG}: nothing that was trained")
    kinds = {name: type(value) for name, value in vars(with_defaults()).items()} | {
        "text_format": str, "max_length": int, "base_config": dict,
        "base_model_name_or_path": str | None, "base_fingerprint": str | None,
    }  # fmt: skip
    for name, value in settings.items():
        kind, part = kinds.get(name, object), int if name == "freeze_layers" else str
        parts_fit = not isinstance(value, list) or all(type(v) is part for v in value)
        if not isinstance(value, int | float if kind is float else kind) or not parts_fit:
            raise ValueError(f"{source}: {name} is {value!r:.40}")
    base = settings.get("base_model_name_or_path")
    if base and base.startswith(os.pardir) and (directory / base).is_dir():
        settings["base_model_name_or_path"] = os.path.normpath(directory / base)  # beside it, wherever the two are now
    return settings, source


def check_base(model: GPT2LMHeadModel, settings: dict, directory: Path, *, asked_for: bool) -> None:
    """Raises ValueError for another base than the one trained on; for other weights only if it was not asked for."""
    where = f"--model_name_or_path {model.base_name}"
    for key, value in settings.get("base_config", {}).items():
        if (have := getattr(model.config, key, None)) != value:
            raise ValueError(f"{where}: {key} is {have}; {directory} was trained on {value}")
    if settings["modification_type"] in PLAIN:  # its own weights are the base
        return
    if settings.get("base_fingerprint") not in (None, model.base_fingerprint):
        message = f"{where}: not the weights that {directory} was trained on"
        if not asked_for:
            raise ValueError(f"{message}; they have changed since")
        logger.warning(message)  # perhaps the same model at another precision


def load_prefix(model: GPT2LMHeadModel, directory: Path) -> None:
    """The virtual tokens from PEFT's file, and the modules trained besides them from our own."""
    path, embedding = directory / WEIGHTS, model.transformer.prefix.embedding
    tensors = read_tensors(path)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != {"prompt_embeddings": tuple(embedding.shape)}:
        raise ValueError(f"{path}: expected prompt_embeddings of shape {tuple(embedding.shape)}, found {found}")
    embedding.data.copy_(tensors["prompt_embeddings"])
    if besides := trainable_state(model).keys() - {"transformer.prefix.embedding"}:
        path = directory / "trainable_modules.safetensors"
        put_tensors(model, read_tensors(path), path, required=besides)


def peft_settings(directory: Path) -> dict:
    """The settings of a LoRA directory that PEFT itself wrote."""
    where = directory / PEFT_CONFIG
    config = read_json(where)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type {config.get('peft_type')!r}; of PEFT's own directories only LORA loads")
    for unsupported in ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "trainable_token_indices"):
        if config.get(unsupported):
            raise ValueError(f"{where}: {unsupported} is not supported")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError(f"{where}: init_lora_weights {config['init_lora_weights']!r} changes the base; not supported")
    return {
        "modification_type": "lora",
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "lora_rank": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "lora_dropout": config.get("lora_dropout", 0.0),
    }


def load_lora(model: GPT2LMHeadModel, directory: Path, args: argparse.Namespace, settings: dict) -> None:
    """Wraps the layers whose A and B the file holds, whatever pattern chose them, and loads everything into place.

    Ranks come from the tensors' shapes; alpha, rsLoRA and their exceptions from PEFT's configuration; the thirds that
    a run of ours adapted from its own metadata. Tensors of whole modules (modules_to_save, biases) train on.
    """
    path, config = directory / WEIGHTS, read_json(directory / PEFT_CONFIG)
    tensors = {key.removeprefix(PEFT_PREFIX).replace(".base_layer", ""): t for key, t in read_tensors(path).items()}
    wrapped = {key.split(".lora_")[0] for key in tensors if ".lora_" in key}
    layers, others = peft_expects(model, config)
    if missing := ({f"{name}.lora_{m}.weight" for name in layers | wrapped for m in "AB"} | others) - tensors.keys():
        raise ValueError(f"{path}: lacks {min(missing)}")
    targets = settings.get("lora_target_modules") or sorted(wrapped)
    thirds = match_targets(model, targets)
    if thirds.keys() != wrapped:
        raise ValueError(f"{path}: its LoRA for {min(thirds.keys() ^ wrapped)} does not match the settings")
    lora_settings = {name: getattr(args, name) for name in SETTINGS["lora"]}
    start_modification(model, "lora", **lora_settings, lora_target_modules=targets)
    exceptions = config.get("alpha_pattern") or {}  # keys: regular expressions of the end of a layer's name
    for name in sorted(wrapped):
        A, B, parts = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight"), len(thirds[name]) or 1
        own_alpha = [value for end, value in exceptions.items() if re.match(rf"(.*\.)?({end})$", name)]
        rank, alpha = max(1, len(A) // parts), [*own_alpha, config.get("lora_alpha", 8)][0] / parts
        rslora = bool(config.get("use_rslora"))
        layer = LoRALayer(model.get_submodule(name), rank, alpha, args.lora_dropout, thirds[name], rslora)
        if A.shape != layer.lora_A.shape or B.shape != layer.full_B().shape:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"{path}: A and B of {name} have shapes {shapes}, which do not fit the layer")
        if thirds[name]:  # each third's B is the block where its rows of B meet its columns
            rows = dict(zip("qkv", B.chunk(3), strict=True))
            B = torch.cat([rows[third].chunk(parts, dim=1)[i] for i, third in enumerate(thirds[name])])
        put_tensors(layer, {"lora_A": A, "lora_B": B}, path)
        model.set_submodule(name, layer)
    wte, head = (tensors.get(f"{name}.weight") for name in ("transformer.wte", "lm_head"))
    if is_tied(model) and ((wte is None) != (head is None) or (wte is not None and not torch.equal(wte, head))):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False  # PEFT trained one of the two alone
    for key in [key for key in tensors if key.rpartition(".")[0] in wrapped]:
        name, _, leaf = key.rpartition(".")
        tensors[f"{name}.original_layer.{leaf}"] = tensors.pop(key)
    put_tensors(model, tensors, path)
    for name in tensors:  # PEFT writes a wrapped head's own weight too, which does not train
        model.get_parameter(name).requires_grad_(not name.endswith(".original_layer.weight"))
    model.modification["trainable_modules"] = settings.get("trainable_modules", [])


def peft_expects(model: GPT2LMHeadModel, config: dict) -> tuple[set[str], set[str]]:
    """(layers, parameters of other modules) that a PEFT configuration says are in the file, where it is plain."""
    linear = {name for name, module in model.named_modules() if isinstance(module, Conv1D | nn.Linear)}
    targets, layers = config.get("target_modules"), set()
    if not config.get("exclude_modules") and config.get("layers_to_transform") is None:
        if isinstance(targets, list):
            layers = {name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)}
        elif targets and targets != "all-linear":
            layers = {name for name in linear if re.fullmatch(targets, name)}
    saved = [m for suffix in config.get("modules_to_save") or [] for m in modules_named(model, suffix)]
    others = {f"{name}.{leaf}" for name in saved for leaf, _ in model.get_submodule(name).named_parameters()}
    bias = config.get("bias", "none")
    others |= {name for name, _ in model.named_parameters() if name.endswith(".bias") and bias == "all"}
    others |= {f"{name}.bias" for name in layers if bias == "lora_only"}
    layers -= {name for name in layers if any(f"{name}.".startswith(f"{whole}.") for whole in saved)}  # as PEFT does
    return layers, others & {name for name, _ in model.named_parameters(remove_duplicate=False)}


def merge_directory(adapter_path: str, merge_to: str, model_name_or_path: str | None) -> None:
    """Folds the LoRA of `adapter_path` into its base and writes a plain Hugging Face model, tokenizer files too."""
    model = load_trained(adapter_path, model_name_or_path)
    technique, where = model.modification["modification_type"], f"--adapter_path {adapter_path}"
    if technique in PLAIN:
        raise ValueError(f"{where}: {technique} saves a plain model already, use it as it is")
    if technique != "lora":
        raise ValueError(f"{where}: {technique} cannot be folded into the base: it is no update of weights")
    if Path(merge_to).exists() and (not Path(merge_to).is_dir() or any(Path(merge_to).iterdir())):
        raise ValueError(f"--merge_to {merge_to}: exists and is not an empty directory")
    stored = GPT2Config.from_pretrained(model.base_path).dtype or torch.float32  # the precision of the base's files
    merge_lora(model).to(stored).save_pretrained(merge_to)
    for pattern in ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"):
        for file in Path(adapter_path).glob(pattern):
            shutil.copy(file, merge_to)
    logger.info("Merged: %s holds a plain GPT-2 for AutoModelForCausalLM.from_pretrained", merge_to)


# ---- the script ------------------------------------------------------------------------------------------------------

COMPARED = [
    ("full fine-tuning", "", {"modification_type": "full"}),
    ("selective, lower half frozen", "", {"modification_type": "selective"}),
    ("LoRA r=4, all Conv1D", "Hu 2021", {}),
    ("LoRA r=4, query and value", "Hu 2021", {"lora_target_modules": ["c_attn.q", "c_attn.v"]}),
    ("adapters 64, two a block", "Houlsby 2019", {"modification_type": "adapter", "adapter_placement": "houlsby"}),
    ("adapters 64, one a block", "Pfeiffer 2020", {"modification_type": "adapter"}),
    ("prefix 50, keys and values", "Li & Liang 2021", {"modification_type": "prefix", "prefix_type": "key_value"}),
    ("prefix 50, embeddings", "Lester 2021", {"modification_type": "prefix"}),
]


def meta_model(args: argparse.Namespace) -> GPT2LMHeadModel:
    """The modified model on PyTorch's meta device: every shape, no weight."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(read_config(args))
    model.tie_weights()
    return modify(model, args)


def compare(args: argparse.Namespace) -> list[dict]:
    """What each technique trains and saves (fp32) on the base that the flags name, counted on the meta device."""
    base = ("model_name_or_path", "from_scratch", *SCRATCH_SIZES)
    chosen_base = argparse.Namespace(**{name: getattr(args, name) for name in base})
    half, rows = list(range(read_config(args).n_layer // 2)), []
    for label, paper, chosen in COMPARED:
        settings = with_defaults(chosen_base, freeze_layers=half, **chosen)
        model = meta_model(settings)
        total, trainable = parameter_counts(model)
        saved = total if settings.modification_type in PLAIN else trainable
        if settings.modification_type == "lora":  # thirds are saved as one LoRA of the whole layer
            saved = sum(tensor.numel() for tensor in lora_as_peft(model, trainable_state(model))[0].values())
        rows.append({"label": label, "paper": paper, "total": total, "trainable": trainable, "saved_mb": saved * 4e-6})
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'technique':<30}{'trainable':>14}{'ratio':>9}{'saved':>12}{'optimizer':>12}  paper"]
    for row in rows:
        ratio, optimizer_mb = row["trainable"] / row["total"], row["trainable"] * 8e-6  # AdamW: two fp32 moments
        numbers = f"{row['trainable']:>14,}{ratio:>9.2%}{row['saved_mb']:>9,.1f} MB{optimizer_mb:>9,.1f} MB"
        lines.append(f"{row['label']:<30}{numbers}  {row['paper']}".rstrip())
    return "\n".join(lines)


def plot_comparison(rows: list[dict], title: str, path: str) -> None:
    """Bars of the trainable parameters of each technique, on a log scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([row["label"] for row in rows], [row["trainable"] for row in rows], color="#4c72b0")
    axes.bar_label(bars, [f"{r['trainable']:,} ({r['trainable'] / r['total']:.2%})" for r in rows], padding=4)
    axes.set(xscale="log", xlabel="trainable parameters", title=title)
    axes.set_xlim(right=max(row["trainable"] for row in rows) * 60)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="modify_llm.py",
        description="Count what a technique trains in GPT-2, compare techniques, or merge a LoRA.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        parents=[model_flags()],
        formatter_class=HelpFormat,
        epilog="examples:\n" + "\n".join(__doc__.splitlines()[2:5]),
    )
    add = parser.add_argument_group("tasks (without one: count what --modification_type trains)").add_argument
    add("--compare", **SWITCH, help="every technique side by side, no weights loaded (false)")
    add("--plot", metavar="FILE.png", help="with --compare: draw it (none)")
    add("--adapter_path", metavar="DIR", help="what a run saved in best/ or final/ (none)")
    add("--merge_to", metavar="DIR", help="fold the LoRA of --adapter_path into a plain GPT-2 there (none)")
    args = parser.parse_args(argv)
    problems = model_problems(args)
    if bool(args.adapter_path) != bool(args.merge_to):
        problems.append("--adapter_path and --merge_to: give both, or neither")
    if args.plot and not args.compare:
        problems.append("--plot: needs --compare")
    if args.compare and args.merge_to:
        problems.append("--compare and --merge_to: two tasks, give one")
    if problems:
        parser.error("; ".join(problems))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="ignore")  # a cp1252 terminal gets the lines without the emoji
    level = logging.WARNING if args.compare else logging.INFO  # the coverage of each LoRA target is no news there
    logging.basicConfig(level=level, format="%(levelname)s:%(name)s:%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    lines = idle_flags(args, parser.get_default)
    if args.compare or args.merge_to:
        base = ("model_name_or_path", "from_scratch", *SCRATCH_SIZES, "compare", "plot", "adapter_path", "merge_to")
        given = [name for name, value in vars(args).items() if value != parser.get_default(name) and name not in base]
        lines = [f"--{name}: without effect with --{'merge_to' if args.merge_to else 'compare'}" for name in given]
    for line in lines:
        logger.warning(line)
    try:
        if args.merge_to:
            given = args.model_name_or_path != parser.get_default("model_name_or_path")
            merge_directory(args.adapter_path, args.merge_to, args.model_name_or_path if given else None)
        elif args.compare:
            rows = compare(args)
            print(table(rows))
            if args.plot:
                name = "GPT-2 of these sizes" if args.from_scratch else args.model_name_or_path
                plot_comparison(rows, f"{name}: what each technique trains", args.plot)
        else:
            print(statistics(meta_model(args)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `modify_llm.py | head` ends quietly
    sys.exit(main())
