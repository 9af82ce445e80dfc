"""Training on a GPU without numbers, for machines that have none.

    python tests/gpu_rehearsal.py            # launches a micro-batch, beside transformers and PEFT

PyTorch lets a device be registered in Python on a CPU build; under FakeTensorMode its tensors carry
shapes, dtypes and devices alone. With CUDA's autocast rules put in, a whole training step can be
rehearsed: where two devices meet it raises, each time that the host waits for the device is
written down, and so is each launch of a kernel. It cannot show a value, which kernel is chosen, a
race between streams, or anything of NCCL. A device cannot be taken back, so this is a process of
its own: see test_gpu_rehearsal.py.
"""

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import import_utils

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_pipeline
import modify_llm
import train_llm

aten = torch.ops.aten
backend_registration._setup_privateuseone_for_python_backend("fakegpu")
torch.fakegpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) is seen as a copy
import_utils.is_fake_tensor = lambda _: False  # else transformers believes that it is traced
SDPA = F.scaled_dot_product_attention
GPU, FAKE = torch.device("fakegpu", 0), FakeTensorMode()
TECHNIQUES = {
    "LoRA": [],
    "LoRA on q and v": ["--lora_target_modules=c_attn.q,c_attn.v"],
    "LoRA with dropout": ["--lora_dropout=0.1", "--dropout=0.1"],
    "DoRA": ["--lora_dora"],
    "LoRA, embeddings trained": ["--trainable_modules=wte,wpe,ln_1,ln_2,ln_f"],
    "LoRA, checkpointing": ["--gradient_checkpointing"],
    "full": ["--modification_type=full"],
    "full, checkpointing": ["--modification_type=full", "--gradient_checkpointing"],
    "selective": ["--modification_type=selective", "--freeze_layers=0"],
    "selective, head frozen": [
        "--modification_type=selective", "--freeze_layers=0", "--freeze_head",
    ],
    "adapters, pfeiffer": ["--modification_type=adapter"],
    "adapters, houlsby": ["--modification_type=adapter", "--adapter_placement=houlsby"],
    "prefix, embedding": ["--modification_type=prefix"],
    "prefix, key_value": ["--modification_type=prefix", "--prefix_type=key_value"],
    "prefix, key_value by an MLP": [
        "--modification_type=prefix", "--prefix_type=key_value", "--prefix_projection_size=16"
    ],
    "IA3": ["--modification_type=ia3"],
    "BitFit": ["--modification_type=bitfit"],
    "LayerNorms": ["--modification_type=layernorm"],
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Operators that launch nothing
NO_KERNEL = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "detach", "alias", "as_strided", "split", "unbind", "split_with_sizes", "reshape",
    "_reshape_alias", "unfold", "diagonal", "lift_fresh", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "resize_", "is_pinned", "device", "chunk",
}  # fmt: skip
# ... and those that launch several, on CUDA
KERNELS = {
    "select_backward": 2, "slice_backward": 2, "embedding_dense_backward": 2, "nonzero": 5,
    "_scaled_dot_product_flash_attention_backward": 4,
    "_scaled_dot_product_efficient_attention_backward": 3,
}  # fmt: skip


# ---- the device ----------------------------------------------------------------------------------


def cuda_autocast_rules() -> list[torch.library.Library]:
    """Which operators CUDA's autocast runs in half precision, and which in fp32 (PyTorch's
    autocast_mode.h), for the fake device. They hold as long as the libraries live."""
    everything = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel)
    rules = torch.library.Library("aten", "IMPL")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def rule(operator: Any, exact: bool) -> None:
        def cast(*args: Any, **kwargs: Any) -> Any:
            def to(x: Any) -> Any:
                fitting = isinstance(x, Tensor) and x.is_floating_point()
                return x.to(dtype) if fitting else x

            with torch._C._ExcludeDispatchKeyGuard(keys):
                dtype = torch.float32 if exact else torch.get_autocast_dtype("fakegpu")
                return operator(*tree_map(to, args), **tree_map(to, kwargs))

        rules.impl(operator.name().split("::")[1], cast, "AutocastPrivateUse1")

    for name in ("addmm", "mm", "bmm", "baddbmm", "matmul", "linear"):
        rule(getattr(aten, name).default, exact=False)
    exact = (aten.layer_norm.default, aten.softmax.int, aten.log_softmax.int, aten.log.default)
    exact += (aten.sum.default, aten.sum.dim_IntList, aten.nll_loss.default, aten.exp.default)
    for operator in (*exact, aten.pow.Tensor_Scalar):
        rule(operator, exact=True)
    return [everything, rules]


class LowerRight:
    """Stands for torch.nn.attention.bias.causal_lower_right, a subclass of real tensors."""

    ndim = 2

    def __init__(self, *_: int) -> None:
        pass


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """What CUDA chooses: the flash kernel without a mask, else the memory-efficient one."""
    if query.device.type == "cpu":
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if torch.is_autocast_enabled("fakegpu"):
        dtype = torch.get_autocast_dtype("fakegpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    lower_right = isinstance(attn_mask, LowerRight)
    if attn_mask is None or lower_right:
        causal = is_causal or lower_right
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, causal, False, scale=scale
        )[0]
    if attn_mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=GPU)
        attn_mask = torch.where(attn_mask, zero, torch.full_like(zero, -math.inf))
    attn_mask = attn_mask.expand(*query.shape[:2], *attn_mask.shape[-2:])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class FakeGpu(TorchDispatchMode):
    """Inside, what lies on GPU is fake: `waits` says what the host waited for, `launches` how many
    kernels each operator launched."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: Counter[str] = Counter()
        self.pinned: dict[int, Tensor] = {}  # by address

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))) and (
            to is None or torch.device(to).type != "fakegpu"
        ):
            return operator(*args, **kwargs)
        name = operator.__name__.split(".")[0]
        if name == "_local_scalar_dense":
            self.waits.append("item")
            return 1.0 if args[0].is_floating_point() else 1
        if name in ("nonzero", "masked_select", "equal", "_unique2"):
            self.waits.append(name)
        if name == "_to_copy" and to is not None and args[0].device.type != torch.device(to).type:
            if torch.device(to).type == "cpu":
                self.waits.append("to the CPU")
                return torch.ones(args[0].shape)
            self.watch_copy(args[0], kwargs)
        if name.startswith(("_fused_adam", "_amp_foreach")):
            return None
        if name == "_amp_update_scale_":
            return args[0]

        def faked(x: Any) -> Any:
            real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
            return FAKE.from_tensor(x) if real else x

        with FAKE:  # raises where devices meet
            result = operator(*tree_map(faked, args), **tree_map(faked, kwargs))
        empty = isinstance(result, Tensor) and not result.numel()
        if name not in NO_KERNEL and not empty:
            self.launches[name] += KERNELS.get(name, 1)
        return result

    def watch_copy(self, tensor: Tensor, kwargs: dict) -> None:
        """A copy to the device must not wait, so it must come from pinned memory."""
        if isinstance(tensor, FakeTensor) or not tensor.numel():
            return
        if not kwargs.get("non_blocking"):
            self.waits.append("blocking copy")
        elif tensor.data_ptr() not in self.pinned:
            self.waits.append("copy from memory that is not pinned")

    def pin(self, tensor: Tensor) -> Tensor:
        """Tensor.pin_memory of this device."""
        copy = tensor.clone()
        self.pinned[copy.data_ptr()] = copy
        return copy

    def tolist(self, tensor: Tensor) -> list[float]:
        self.waits.append("tolist")
        return [1.0] * tensor.numel()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        rules = cuda_autocast_rules()
        with (
            mock.patch.object(FakeTensor, "tolist", lambda x: self.tolist(x)),
            mock.patch.object(FakeTensor, "is_cuda", property(lambda _: True)),
            mock.patch.object(Tensor, "pin_memory", lambda x: self.pin(x)),
            mock.patch.object(F, "scaled_dot_product_attention", sdpa),
            mock.patch.object(train_llm, "causal_lower_right", LowerRight),
            self,
        ):
            yield
        del rules


def put_on_gpu(model: nn.Module) -> None:
    """As `model.to(device)`, which keeps the parameters' kind and so fails for a fake device."""
    moved: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in moved:
                copy = parameter.detach().pin_memory().to(GPU, non_blocking=True)
                moved[parameter] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[parameter]


def run_on_gpu(flags: list[str], precision: str) -> train_llm.Run:
    """The parts of a run that a step needs, inside FakeGpu.in_use."""
    args = train_llm.resolve(
        vars(train_llm.build_parser().parse_args(["--dataset_path=-", "--from_scratch", *flags]))
    )
    args.warmup_steps = 0
    dtype = DTYPES[precision]
    model = modify_llm.final_modify(args)
    train_llm.prepare_model(model, args, train_llm.Runtime(torch.device("cpu"), dtype))
    put_on_gpu(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    counts = modify_llm.parameter_counts(model)
    runtime = train_llm.Runtime(GPU, dtype)
    return train_llm.Run(
        args, runtime, None, None, None, "", "", model, counts, trainable,
        train_llm.make_optimizer(model, args),
        torch.amp.GradScaler("fakegpu", enabled=runtime.fp16), None, None, total_steps=10,
    )  # fmt: skip


# ---- a step and an evaluation --------------------------------------------------------------------


def rehearse(flags: list[str], precision: str) -> dict[str, Any]:
    """What the host waits for in an optimizer step of two micro-batches and in an evaluation, how
    many gradients are left after the step, and what was raised."""
    layers = 2 if "--freeze_head" in flags else 1  # one of them trains
    sizes = ["--hidden_size=32", f"--num_hidden_layers={layers}", "--num_attention_heads=4"]
    gpu, lengths = FakeGpu(), (60, 58, 44, 31, 12, 5)
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in lengths]
    window = [data_pipeline.PadBatch(0, None)(rows) for _ in range(2)]
    try:
        with gpu.in_use():
            run = run_on_gpu([*sizes, "--vocab_size=300", *flags], precision)
            loss = train_llm.SummedLoss(run.model).train()
            with train_llm.attention_without_mask(run.model):
                train_llm.train_step(run, loss, window)  # makes the optimizer's state
                gpu.waits.clear()
                train_llm.train_step(run, loss, window)
                found = {"step": gpu.waits[:]}
                found["gradients"] = sum(p.grad is not None for p in run.trainable.values())
                gpu.waits.clear()
                train_llm.evaluate(loss, window, run.runtime)
        return found | {"evaluation": gpu.waits, "raised": ""}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {modify_llm.first_line(error)}"}


# Each is a mistake that a CPU forgives; the rehearsal must not.
def position_ids_without_a_device(model: nn.Module) -> None:
    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        return nn.Embedding.forward(module, torch.arange(ids.shape[-1]))

    model.transformer.wpe.forward = forward.__get__(model.transformer.wpe)


def waiting_for_the_loss(forward: Callable) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        loss = forward(*args, **kwargs)
        float(loss)
        return loss

    return wrapped


def mistakes() -> dict[str, Any]:
    """{mistake: what the rehearsal finds}"""
    prepare, forward = train_llm.prepare_model, train_llm.SummedLoss.forward

    def prepare_wrongly(model: nn.Module, *rest: Any) -> None:
        prepare(model, *rest)
        position_ids_without_a_device(model)

    patches = {
        "an arange without a device": ("prepare_model", prepare_wrongly),
        "a blocking copy": ("to_device", lambda x, runtime: x.to(runtime.device)),
        "a copy that is not pinned": (
            "to_device", lambda x, runtime: x.to(runtime.device, non_blocking=True)
        ),
    }  # fmt: skip
    found = {}
    for name, (attribute, wrong) in patches.items():
        with mock.patch.object(train_llm, attribute, wrong):
            found[name] = rehearse([], "bf16")
    with mock.patch.object(train_llm.SummedLoss, "forward", waiting_for_the_loss(forward)):
        found["a float(loss)"] = rehearse([], "bf16")
    with mock.patch.object(torch.optim.Optimizer, "zero_grad", lambda *_, **__: None):
        found["gradients kept"] = rehearse([], "bf16")
    return found


# ---- launches ------------------------------------------------------------------------------------


def mean_launches(
    gpu: FakeGpu, model: nn.Module, work: Callable[[dict], Tensor], batches: list[dict]
) -> float:
    """Of the forward and backward pass of a step's first micro-batch; a later one adds each
    gradient to the last."""
    gpu.launches.clear()
    for batch in batches:
        work(batch).backward()
        model.zero_grad(set_to_none=True)
    return sum(gpu.launches.values()) / len(batches)


def launches_of_ours(flags: list[str], batches: list[dict[str, Tensor]]) -> float:
    """Mean launches of a micro-batch's forward and backward pass in this project."""
    gpu = FakeGpu()
    with gpu.in_use():
        run = run_on_gpu(flags, "bf16")
        loss = train_llm.SummedLoss(run.model).train()

        def work(batch: dict[str, Tensor]) -> Tensor:
            (inputs,) = train_llm.loss_inputs(batch, run.runtime, math.inf)
            with run.runtime.autocast():
                return loss(**inputs)

        with train_llm.attention_without_mask(run.model):
            return mean_launches(gpu, loss, work, batches)


def launches_of_peers(config: Any, batches: list[dict[str, Tensor]]) -> float:
    """The same by transformers' GPT-2 and PEFT, as the Trainer runs them: padded batches with
    their mask, bf16 autocast over fp32 weights, the model's own loss."""
    from peft import get_peft_model

    gpu = FakeGpu()
    drops = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**drops))
    model = get_peft_model(model, config) if config else model
    with gpu.in_use():
        put_on_gpu(model)

        def work(batch: dict[str, Tensor]) -> Tensor:
            inputs = {k: v.pin_memory().to(GPU, non_blocking=True) for k, v in batch.items()}
            with torch.autocast("fakegpu", torch.bfloat16):
                return model.train()(**inputs).loss

        return mean_launches(gpu, model, work, batches)


def launches() -> None:
    """Prints launches a micro-batch, ours beside transformers and PEFT, as a table."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    torch.manual_seed(0)
    loader = data_pipeline.final_dataset_loader(
        text_format="alpaca", padding="longest", group_by_length=True, num_workers=0
    )
    batches = list(itertools.islice(loader, 4))
    virtual = {"num_virtual_tokens": 50, "task_type": "CAUSAL_LM"}
    layers = ["c_attn", "c_proj", "c_fc"]
    peers = {
        "LoRA": LoraConfig(
            r=4, lora_alpha=8, target_modules=layers, fan_in_fan_out=True, task_type="CAUSAL_LM"
        ),
        "full": None,
        "prefix, embedding": PromptTuningConfig(**virtual),
        "prefix, key_value": PrefixTuningConfig(**virtual),
    }
    print("| technique | launches a micro-batch | transformers and PEFT |\n| --- | ---: | ---: |")
    for name, flags in TECHNIQUES.items():
        ours = launches_of_ours(flags, batches)
        theirs = f"{launches_of_peers(peers[name], batches):,.0f}" if name in peers else ""
        print(f"| {name} | {ours:,.0f} | {theirs} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = sys.argv[1:]
    if not asked:
        launches()
    elif asked == ["mistakes"]:
        print(json.dumps(mistakes()))
    else:
        print(json.dumps({
            f"{name}, {precision}": rehearse(flags, precision)
            for name, flags in TECHNIQUES.items() for precision in DTYPES
        }))  # fmt: skip
