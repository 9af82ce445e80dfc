"""Claim: each technique of modify_llm.py computes what its paper writes and trains what the
published tables count, and what it saves is what PEFT and transformers themselves load, with equal
logits.

    python -m pytest tests/test_modify_llm.py -q

Needs peft, accelerate and matplotlib, which the technique's own code never imports.
"""

import argparse
import ast
import copy
import dataclasses
import hashlib
import http.server
import io
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from conftest import tiny_gpt2
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

import modify_llm
from modify_llm import (
    BottleneckAdapter,
    LoRALayer,
    apply_adapters,
    apply_full_finetuning,
    apply_ia3,
    apply_lora,
    apply_prefix,
    apply_selective_freezing,
    final_modify,
    load_trained,
    main,
    merge_lora,
    parameter_counts,
    save_trained,
    statistics,
    trainable_state,
)

HIDDEN, LAYERS, VOCAB, POSITIONS, LENGTH = 32, 3, 300, 64, 6
CONV1D = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def small(**overrides):
    """A GPT-2 small enough for dozens of tests, its weights large enough to make logits differ."""
    sizes = {
        "vocab_size": VOCAB,
        "n_layer": LAYERS,
        "n_positions": POSITIONS,
        "initializer_range": 0.2,
    }
    special = {"bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1}
    return tiny_gpt2(**{**sizes, **special, **overrides})


def perturb(model, scale=0.05, seed=1):
    """Moves every trainable parameter off its start, as training would: no update is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def token_ids(rows=2, length=9, seed=2, vocab=VOCAB):
    return torch.randint(vocab - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids=None, **inputs):
    return model.eval()(input_ids=token_ids() if ids is None else ids, **inputs).logits


def close(a, b, relative=1e-5):
    """Equal up to rounding, by the norm of the difference: fp32 sums differ in their last bits."""
    return a.shape == b.shape and bool(torch.linalg.norm(a - b) <= relative * torch.linalg.norm(b))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small model as a local directory."""
    directory = tmp_path_factory.mktemp("small_base")
    small().save_pretrained(directory)
    return str(directory)


def plain(directory):
    return GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()


def modified(base, **settings):
    return final_modify(
        model_name_or_path=base, **{"prefix_length": LENGTH, "adapter_size": 8, **settings}
    )


def refused(capsys, argv):
    """The message of a refusal, which is exit status 2 and a single line on stderr."""
    with pytest.raises(SystemExit) as exit_status:
        main(argv)
    captured = capsys.readouterr()
    assert exit_status.value.code == 2
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("modify_llm.py: error: "), captured.err
    return lines[0].removeprefix("modify_llm.py: error: ")


TECHNIQUES = {
    "lora": {"modification_type": "lora"},
    "lora on thirds": {"lora_target_modules": ["c_attn.q", "c_attn.v"]},
    "pfeiffer": {"modification_type": "adapter"},
    "houlsby": {"modification_type": "adapter", "adapter_placement": "houlsby"},
    "embedding prefix": {"modification_type": "prefix"},
    "key_value prefix": {"modification_type": "prefix", "prefix_type": "key_value"},
    "reparametrised prefix": {
        "modification_type": "prefix",
        "prefix_type": "key_value",
        "prefix_projection_size": 24,
    },
    "selective": {"modification_type": "selective", "freeze_layers": [0]},
    "selective, head frozen": {
        "modification_type": "selective",
        "freeze_layers": [0, 1],
        "freeze_head": True,
    },
    "full": {"modification_type": "full"},
    "dora": {"lora_dora": True},
    "rank stabilized": {"lora_scaling": "rank_stabilized", "lora_target_modules": ["c_attn.q"]},
    "lora on a layer": {"lora_layers": [1]},
    "ia3": {"modification_type": "ia3"},
    "ia3 and norms": {"modification_type": "ia3", "trainable_modules": ["ln_f"]},
    "bitfit": {"modification_type": "bitfit"},
    "layernorm": {"modification_type": "layernorm"},
}
every_technique = pytest.mark.parametrize("settings", TECHNIQUES.values(), ids=TECHNIQUES.keys())


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "trainable", "total", "ratio"),
    [
        ("--modification_type full", 124_439_808, 124_439_808, "1.0000 (100.00%)"),
        ("", 589_824, 125_029_632, "0.0047 (0.47%)"),
        ("--trainable_modules wte,wpe,ln_1,ln_2,ln_f", 40_012_032, 125_029_632, "0.3200 (32.00%)"),
        ("--lora_target_modules c_attn.q,c_attn.v", 147_456, 124_587_264, "0.0012 (0.12%)"),
        (  # Hu et al., table 3, prints 0.35M; by section 5.1's formula it is 2 x d x r x 48 matrices
            "--model_name_or_path gpt2-medium --lora_target_modules c_attn.q,c_attn.v",
            393_216,
            355_216_384,
            "0.0011 (0.11%)",
        ),
        ("--lora_rank 8 --lora_target_modules c_attn", 294_912, 124_734_720, "0.0024 (0.24%)"),
        ("--modification_type adapter", 1_189_632, 125_629_440, "0.0095 (0.95%)"),
        (
            "--modification_type adapter --adapter_placement houlsby",
            2_379_264,
            126_819_072,
            "0.0188 (1.88%)",
        ),
        (
            "--modification_type adapter --adapter_placement houlsby --adapter_size 128",
            4_740_096,
            129_179_904,
            "0.0367 (3.67%)",
        ),
        ("--modification_type prefix", 38_400, 124_478_208, "0.0003 (0.03%)"),
        (
            "--modification_type prefix --prefix_type key_value",
            921_600,
            125_361_408,
            "0.0074 (0.74%)",
        ),
        (
            "--modification_type selective --freeze_layers 0-5",
            81_126_144,
            124_439_808,
            "0.6519 (65.19%)",
        ),
        ("--modification_type selective", 81_126_144, 124_439_808, "0.6519 (65.19%)"),
        # DoRA: LoRA's and a magnitude an output, 12 x (2304 + 768 + 3072 + 768)
        ("--lora_dora", 672_768, 125_112_576, "0.0054 (0.54%)"),
        ("--lora_layers 6-11", 294_912, 124_734_720, "0.0024 (0.24%)"),
        # 12 x (2304 + 3072)
        ("--modification_type ia3", 64_512, 124_504_320, "0.0005 (0.05%)"),
        # 12 x (2304 + 768 + 3072 + 768 + 2 x 768) + 768
        ("--modification_type bitfit", 102_144, 124_439_808, "0.0008 (0.08%)"),
        # (2 x 12 + 1) x 2 x 768
        ("--modification_type layernorm", 38_400, 124_439_808, "0.0003 (0.03%)"),
    ],
)
def test_flags_reproduce_the_published_counts(capsys, flags, trainable, total, ratio):
    assert main(flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("📊 Final Parameter Statistics:")
    assert [line.strip() for line in lines[start + 1 : start + 4]] == [
        f"Total parameters: {total:,}",
        f"Trainable parameters: {trainable:,}",
        f"Trainable ratio: {ratio}",
    ]


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "published"),
    [
        ("distilgpt2", 6, 768, 81_912_576),
        ("gpt2", 12, 768, 124_439_808),
        ("openai-community/gpt2", 12, 768, 124_439_808),
        ("gpt2-medium", 24, 1024, 354_823_168),
        ("gpt2-large", 36, 1280, 774_030_080),
        ("gpt2-xl", 48, 1600, 1_557_611_200),
    ],
)
def test_the_published_sizes_are_counted_without_their_weights(
    capsys, name, layers, hidden, published
):
    block = 12 * hidden**2 + 13 * hidden  # four projections with biases, two LayerNorms
    assert published == (50257 + 1024) * hidden + layers * block + 2 * hidden
    main(["--modification_type", "full", "--model_name_or_path", name])
    assert f"Total parameters: {published:,}\n" in capsys.readouterr().out


def test_every_parameter_has_its_line_and_the_lines_add_up(capsys):
    main([])
    out = capsys.readouterr().out
    assert "🔍 Parameter Trainability Status:\n" in out
    assert "✅ transformer.h.0.attn.c_attn.lora_A: Trainable (3,072 params)\n" in out
    assert (
        "❄️  transformer.h.0.attn.c_attn.original_layer.weight: Frozen (1,769,472 params)\n" in out
    )
    counted = {"✅": 0, "❄️": 0}
    for line in out.splitlines():
        if line.endswith(" params)"):
            counted[line.split()[0]] += int(line.rpartition("(")[2].split()[0].replace(",", ""))
    assert counted == {"✅": 589_824, "❄️": 124_439_808}


@every_technique
def test_the_script_counts_what_the_built_model_holds(capsys, base, settings):
    flags = [
        f"--{key}={','.join(map(str, v)) if isinstance(v, list) else v}"
        for key, v in settings.items()
    ]
    flags += ["--model_name_or_path", base, "--prefix_length", str(LENGTH), "--adapter_size", "8"]
    main(flags)
    assert capsys.readouterr().out.strip() == statistics(modified(base, **settings)).strip()


def test_a_model_from_scratch_takes_its_sizes_from_the_flags(capsys):
    flags = "--from_scratch --vocab_size 100 --hidden_size 24 --num_attention_heads 3"
    flags += " --num_hidden_layers 5 --max_position_embeddings 40 --modification_type full"
    main(flags.split())
    total = (100 + 40) * 24 + 5 * (12 * 24**2 + 13 * 24) + 2 * 24
    assert f"Total parameters: {total:,}\n" in capsys.readouterr().out


def test_compare_shows_every_technique_and_plot_writes_a_picture(capsys, tmp_path):
    picture = tmp_path / "compared.png"
    assert main(["--compare", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    for counted in (
        124_439_808,
        81_126_144,
        589_824,
        147_456,
        2_379_264,
        1_189_632,
        921_600,
        38_400,
    ):
        assert f" {counted:,} " in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_compare_has_a_row_for_each_variant_of_the_table_the_largest_first(capsys, base):
    rows = modify_llm.compare(modify_llm.with_defaults(model_name_or_path=base))
    listed = [entry[:2] for row in modify_llm.TECHNIQUES.values() for entry in row.compared]
    assert sorted((row["label"], row["paper"]) for row in rows) == sorted(listed)
    trainable = [row["trainable"] for row in rows]
    assert trainable == sorted(trainable, reverse=True) and len(set(trainable)) > 5
    main(["--compare", "--model_name_or_path", base])
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(row["label"]) and f" {row['trainable']:,} " in line
        assert line.endswith(row["paper"])


def test_compare_says_what_the_files_will_weigh(base, tmp_path):
    rows = modify_llm.compare(modify_llm.with_defaults(model_name_or_path=base))
    settings = {
        label: {"modification_type": technique, **changes}
        for technique, entry in modify_llm.TECHNIQUES.items()
        for label, _, changes in entry.compared
    }
    for row in rows:
        if "selective" not in row["label"]:  # whose layers follow from the model's
            model = modify_llm.final_modify(model_name_or_path=base, **settings[row["label"]])
            save_trained(model, directory := tmp_path / row["label"])
            written = sum(
                t.nbytes
                for file in directory.glob("*.safetensors")
                for t in load_file(file).values()
            )
            assert written == pytest.approx(row["saved_mb"] * 1e6), row["label"]


def base_with(base, directory, **changes):
    """A copy of the base, with other values in its config.json."""
    shutil.copytree(base, directory)
    config = modify_llm.read_json(directory / "config.json")
    modify_llm.write_json(directory / "config.json", config | changes)
    return str(directory)


IMPOSSIBLE = [
    {"n_embd": "x"},
    {"n_layer": None},
    {"n_head": 0},
    {"n_head": 5},
    {"n_positions": -3},
    {"activation_function": "nope"},
    {"n_layer": -1},
    {"vocab_size": 0},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_a_configuration_that_no_model_can_have_is_refused_in_one_line(
    capsys, base, tmp_path, changes
):
    directory = base_with(base, tmp_path / "base", **changes)
    where = f"--model_name_or_path {directory}"
    with pytest.raises(ValueError, match=rf"^{re.escape(where)}: \S") as error:
        modified(directory)
    assert "\n" not in str(error.value)
    assert refused(capsys, ["--model_name_or_path", directory]) == str(error.value)


@pytest.mark.parametrize(
    "flags", ["--compare --lora_rank 8", "--merge_to merged --adapter_path absent --lora_rank 8"]
)
def test_a_flag_without_effect_on_the_task_is_pointed_out(capsys, caplog, monkeypatch, flags):
    monkeypatch.setattr(modify_llm, "merge_directory", lambda *_: None)
    assert main(flags.split()) == 0
    assert any("--lora_rank: without effect" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("value", [[], ["true"]], ids=["bare", "true"])
def test_a_switch_may_stand_bare_or_with_its_value(capsys, value):
    assert main(["--model_name_or_path", "distilgpt2", "--compare", *value]) == 0
    assert "Houlsby 2019" in capsys.readouterr().out


def test_a_terminal_without_emoji_gets_the_lines_all_the_same(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    main([])
    sys.stdout.flush()
    text = written.getvalue().decode("cp1252")
    assert (
        "Final Parameter Statistics:" in text
        and "transformer.h.0.attn.c_attn.lora_A: Trainable" in text
    )


def test_the_help_fits_80_columns_and_ends_each_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert (
        max(map(len, shown.splitlines())) <= 80 and "examples:\n    python modify_llm.py" in shown
    )
    flags = [part.split("\n\n")[0].strip() for part in shown.split("\n  --")[1:]]
    assert [flag for flag in flags if not flag.endswith(")")] == []
    assert ">= 1 (4)" in shown and "(c_attn,c_proj,c_fc)" in shown


@pytest.mark.skipif(os.name == "nt", reason="needs a shell's pipes")
def test_output_that_nobody_reads_ends_without_a_word_of_complaint():
    pipeline = ["sh", "-c", '"$@" | head -1', "sh", sys.executable, modify_llm.__file__]
    done = subprocess.run(pipeline, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_no_peft_at_run_time():
    tree = ast.parse(Path(modify_llm.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"torch", "transformers", "safetensors", "huggingface_hub", "matplotlib"}


# ---- LoRA ----------------------------------------------------------------------------------------


def our_name(name):
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


def peft_twin(model, ours, **config):
    """PEFT's LoRA on a copy of the base, with the same A and B."""
    settings = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **config}
    twin = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    state = {n: p for n, p in ours.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".lora_" in name:
                parameter.copy_(state.pop(our_name(name)))
    assert not state
    return twin


@pytest.mark.parametrize(
    ("targets", "rank", "alpha", "options", "their_options"),
    [
        (["c_attn", "c_proj", "c_fc"], 4, 8.0, {}, {}),
        (["attn.c_proj"], 1, 3.0, {}, {}),
        (["c_fc", "lm_head"], 6, 6.0, {}, {}),
        (["c_attn", "c_fc"], 5, 3.0, {"scaling": "rank_stabilized"}, {"use_rslora": True}),
        (["c_attn", "c_proj", "c_fc"], 3, 4.0, {"dora": True}, {"use_dora": True}),
        (["lm_head", "mlp.c_proj"], 2, 9.0, {"dora": True}, {"use_dora": True}),
        (["c_fc", "c_attn"], 2, 2.0, {"layers": [0, 2]}, {"layers_to_transform": [0, 2]}),
    ],
)
def test_lora_trains_as_peft_does(targets, rank, alpha, options, their_options):
    model = small(tie_word_embeddings="lm_head" not in targets)
    ours = apply_lora(copy.deepcopy(model), rank, alpha, target_modules=targets, **options)
    ours, their_options = perturb(ours, 0.02).train(), {"target_modules": targets, **their_options}
    theirs = peft_twin(model, ours, r=rank, lora_alpha=alpha, **their_options).train()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
        for m in (ours, theirs)
    ]
    for step in range(20):
        ids = token_ids(4, 12, seed=step)
        outputs = [m(input_ids=ids, labels=ids) for m in (ours, theirs)]
        for output in outputs:
            output.loss.backward()
        assert close(outputs[0].logits, outputs[1].logits)
        assert outputs[0].loss.item() == pytest.approx(outputs[1].loss.item(), rel=1e-5)
        gradients = {our_name(n): p.grad for n, p in theirs.named_parameters()}
        gradients = {name: grad for name, grad in gradients.items() if grad is not None}
        own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        assert own.keys() == gradients.keys()
        for name, gradient in own.items():
            assert close(gradient, gradients[name]), (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not close(outputs[0].logits, model(input_ids=ids).logits, 1e-3)


@pytest.mark.parametrize("kind", ["Conv1D", "Linear"])
def test_dora_is_its_equation_also_under_dropout_and_when_merged(kind):
    """W' = m (W0 + s B A) / ||W0 + s B A|| by output (Liu et al., 2024, equation 5)."""
    torch.manual_seed(0)
    original = nn.Linear(20, 24) if kind == "Linear" else Conv1D(24, 20)
    layer = LoRALayer(original.requires_grad_(False), 3, 2.0, dropout=0.5, dora=True)
    W0 = (original.weight if kind == "Linear" else original.weight.T).clone()  # (out, in)
    x = torch.randn(7, 20)
    assert torch.allclose(layer.eval()(x), original(x), atol=1e-6)  # starts as the original
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.mul_(torch.rand(24) + 0.5)
    direction = W0 + 2.0 / 3 * layer.lora_B @ layer.lora_A
    m = layer.lora_magnitude_vector
    W = m[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x), x @ W.T + original.bias, atol=1e-5)

    layer.train()
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(1)  # PEFT drops what the update sees, not what the base does
    assert torch.allclose(layer(x), x @ W0.T + original.bias + dropped @ (W - W0).T, atol=1e-5)

    layer.eval().merge()
    assert torch.allclose(layer(x), x @ W.T + original.bias, atol=1e-5)
    layer.unmerge()
    now = original.weight if kind == "Linear" else original.weight.T
    assert torch.allclose(now, W0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["Conv1D", "Linear", "thirds of a Conv1D"])
def test_lora_s_product_is_its_plain_version_in_value_and_gradient(kind, bias):
    """The expression in LoRAProduct's docstring, under autograd."""
    torch.manual_seed(0)
    inner, outer = 20, 24
    original = nn.Linear(inner, outer) if kind == "Linear" else Conv1D(outer, inner)
    original.bias = nn.Parameter(torch.randn(outer)) if bias else None
    thirds = "qv" if kind == "thirds of a Conv1D" else ""
    layer = LoRALayer(original.requires_grad_(False), 3, 2.0, thirds=thirds)
    nn.init.normal_(layer.lora_B)
    x, upstream = torch.randn(2, 7, inner, requires_grad=True), torch.randn(2, 7, outer)

    W = original.weight.T if kind == "Linear" else original.weight  # (in, out)
    b, A, B, s = original.bias, layer.lora_A, layer.full_B(), 2.0 / 3
    tokens = x.flatten(0, 1)
    expected = torch.addmm(b, tokens, W) if bias else tokens @ W
    expected = (expected + s * (tokens @ A.T) @ B.T).view(2, 7, outer)
    h = layer(x)
    assert type(h.grad_fn).__name__ == "LoRAProductBackward"  # the layer takes this path
    assert h.dtype == torch.float32 and close(h, expected, 1e-6)

    inputs = [x, layer.lora_A, layer.lora_B]
    gradients = torch.autograd.grad(expected, inputs, upstream)
    for own, theirs in zip(torch.autograd.grad(h, inputs, upstream), gradients, strict=True):
        assert close(own, theirs, 1e-6)
    # In the lowest layer x needs no gradient: A and B have theirs all the same.
    lowest = torch.autograd.grad(layer(x.detach()), inputs[1:], upstream)
    for own, theirs in zip(lowest, gradients[1:], strict=True):
        assert close(own, theirs, 1e-6)


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("c_proj", ["attn.c_proj", "mlp.c_proj"]),
        ("attn.c_proj", ["attn.c_proj"]),
        ("mlp.c_proj", ["mlp.c_proj"]),
        ("c_fc", ["mlp.c_fc"]),
        ("c_attn.k", ["attn.c_attn"]),
    ],
)
def test_a_target_matches_by_suffix_and_its_number_of_layers_is_logged(caplog, target, layers):
    with caplog.at_level(logging.INFO, logger="modify_llm"):
        model = apply_lora(small(), target_modules=[target])
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    assert wrapped == {f"transformer.h.{i}.{name}" for i in range(LAYERS) for name in layers}
    assert f"{target}: {len(wrapped)} layers" in caplog.text


def test_a_full_name_matches_one_layer():
    model = apply_lora(small(n_layer=12), target_modules=["h.1.mlp.c_fc"])
    assert set(trainable_state(model)) == {f"transformer.h.1.mlp.c_fc.lora_{part}" for part in "AB"}


def test_lora_trains_a_and_b_alone_and_names_them_so():
    model = apply_lora(small(), 4)
    expected = {
        f"transformer.h.{i}.{n}.lora_{part}" for i in range(LAYERS) for n in CONV1D for part in "AB"
    }
    state = trainable_state(model)
    assert set(state) == expected
    assert state["transformer.h.0.mlp.c_proj.lora_A"].shape == (4, 4 * HIDDEN)
    assert state["transformer.h.0.mlp.c_proj.lora_B"].shape == (HIDDEN, 4)
    assert "transformer.h.0.mlp.c_proj.original_layer.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["c_attn.q", "c_attn.v"]])
def test_a_starts_uniform_within_its_fan_in_and_b_at_zero(targets):
    base = small(n_embd=64)
    model = apply_lora(copy.deepcopy(base), 16, target_modules=targets)
    for layer in (module for module in model.modules() if isinstance(module, LoRALayer)):
        bound = 1 / math.sqrt(layer.original_layer.weight.shape[0])  # Conv1D: (in, out)
        assert 0.95 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.lora_B.any()
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("thirds", ["q", "k", "v", "vq", "qkv"])
def test_a_third_changes_its_own_columns_alone(thirds):
    model = perturb(
        apply_lora(small(), 3, 6.0, target_modules=[f"c_attn.{third}" for third in thirds])
    )
    layer, x = model.transformer.h[1].attn.c_attn, torch.randn(2, 5, HIDDEN)
    expected = torch.zeros(2, 5, 3 * HIDDEN)
    for i, third in enumerate(sorted(thirds, key="qkv".index)):
        A, B = layer.lora_A[3 * i : 3 * i + 3], layer.lora_B[HIDDEN * i : HIDDEN * (i + 1)]
        column = HIDDEN * "qkv".index(third)
        expected[..., column : column + HIDDEN] = 6.0 / 3 * (x @ A.T @ B.T)
    update = layer(x) - layer.original_layer(x)
    assert close(update, expected, 1e-5)
    untouched = expected == 0
    assert untouched.any() == (len(thirds) < 3) and not update[untouched].any()
    assert close(x @ layer.get_delta_weight(), expected, 1e-5)


def test_dropout_acts_on_the_input_of_a_and_only_while_training():
    model = perturb(apply_lora(small(), 4, 8.0, dropout=0.5))
    layer, x = model.transformer.h[0].mlp.c_fc, torch.randn(2, 5, HIDDEN)
    A, B = layer.lora_A, layer.lora_B
    assert close(layer(x), layer.original_layer(x) + 2 * x @ A.T @ B.T)
    layer.train()
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(3)
    assert close(layer(x), layer.original_layer(x) + 2 * dropped @ A.T @ B.T)


class Linear8bit(nn.Linear):
    """A stand-in for bitsandbytes' layers, which hold integers."""

    def __init__(self, original):
        super().__init__(1, 1)
        self.weight = nn.Parameter(original.weight.to(torch.int8), requires_grad=False)


def test_a_quantised_layer_is_no_target():
    model = small()
    model.transformer.h[1].mlp.c_fc = Linear8bit(model.transformer.h[1].mlp.c_fc)
    with pytest.raises(ValueError, match=r"c_fc: \S+ is a Linear8bit; LoRA wraps Conv1D and"):
        apply_lora(model, target_modules=["c_fc"])


def test_the_tied_head_is_no_target():
    with pytest.raises(ValueError, match=r"lm_head.*shares its weight"):
        apply_lora(small(), target_modules=["lm_head"])


@pytest.mark.parametrize(
    "targets", [["c_attn", "c_proj", "c_fc"], ["c_attn.q", "c_attn.v"], ["c_fc", "lm_head"]]
)
def test_a_merged_model_is_a_plain_one_with_equal_logits(targets):
    base = small(tie_word_embeddings="lm_head" not in targets)
    model = perturb(apply_lora(copy.deepcopy(base), 4, 8.0, target_modules=targets))
    expected = logits(model)
    merged = merge_lora(model)
    assert (
        type(merged) is GPT2LMHeadModel and merged.state_dict().keys() == base.state_dict().keys()
    )
    assert {type(m) for m in merged.modules()} == {type(m) for m in base.modules()}
    assert close(logits(merged), expected, 1e-4) and not close(expected, logits(base), 1e-2)


@pytest.mark.parametrize("target", ["c_attn", "c_attn.v", "lm_head"])
def test_merging_is_explicit_goes_back_and_is_refused_twice(target):
    model = small(tie_word_embeddings=target != "lm_head")
    model = perturb(apply_lora(model, target_modules=[target]))
    layer = model.lm_head if target == "lm_head" else model.transformer.h[0].attn.c_attn
    original, expected = layer.original_layer.weight.clone(), logits(model)
    assert torch.equal(layer.original_layer.weight, original), "eval() alone merged"
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    assert not close(layer.original_layer.weight, original, 1e-3) and close(
        logits(model), expected, 1e-4
    )
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert close(layer.original_layer.weight, original, 1e-6) and close(
        logits(model), expected, 1e-4
    )


def test_merging_a_model_whose_layers_are_partly_merged_adds_each_update_once():
    model = perturb(apply_lora(small()))
    expected = logits(model)
    model.transformer.h[1].mlp.c_fc.merge()
    assert close(logits(merge_lora(model)), expected, 1e-4)
    with pytest.raises(ValueError, match="a plain model"):
        merge_lora(small())


# ---- IA3, biases, LayerNorms ---------------------------------------------------------------------

PEFT_KINDS = {
    "dora": peft.LoraConfig(
        task_type="CAUSAL_LM", use_dora=True, r=3, fan_in_fan_out=True,
        target_modules=["c_attn", "c_fc"],
    ),
    "rslora": peft.LoraConfig(
        task_type="CAUSAL_LM", use_rslora=True, r=5, fan_in_fan_out=True, target_modules=["c_proj"]
    ),
    "layers": peft.LoraConfig(
        task_type="CAUSAL_LM", layers_to_transform=[1], fan_in_fan_out=True,
        target_modules=["c_attn"],
    ),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True),
    "ia3 and a norm": peft.IA3Config(
        task_type="CAUSAL_LM", fan_in_fan_out=True, modules_to_save=["ln_f"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", PEFT_KINDS.values(), ids=PEFT_KINDS.keys())
def test_what_peft_made_loads_trains_on_and_goes_back(base, config, tmp_path):
    theirs = peft.get_peft_model(plain(base), copy.deepcopy(config))
    perturb(theirs, 0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_trained(tmp_path / "theirs", base)
    assert close(logits(ours), logits(theirs))
    assert sum(p.numel() for p in trainable_state(ours).values()) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    perturb(ours, 0.01)
    save_trained(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(plain(base), tmp_path / "ours")
    assert close(logits(back), logits(ours))
    assert close(logits(load_trained(tmp_path / "ours", base)), logits(ours))
    expected = logits(ours)
    assert close(logits(merge_lora(ours)), expected, 1e-4)
    assert close(logits(back.merge_and_unload()), expected, 1e-4)


def test_ia3_trains_as_peft_does(base):
    config = peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)
    theirs = peft.get_peft_model(plain(base), config).train()
    ours = apply_ia3(plain(base)).train()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
        for m in (ours, theirs)
    ]
    for step in range(20):
        ids = token_ids(4, 12, seed=step)
        outputs = [m(input_ids=ids, labels=ids) for m in (ours, theirs)]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert close(outputs[0].logits, outputs[1].logits)
    trained = {our_name(n): p.flatten() for n, p in theirs.named_parameters() if "ia3_l" in n}
    state = trainable_state(ours)
    assert state.keys() == trained.keys()
    assert all(close(state[name], trained[name], 1e-4) for name in trained)


@pytest.mark.parametrize("whole", ["wte", "lm_head"])
def test_an_ia3_that_peft_made_beside_a_module_trained_whole_loads(base, tmp_path, whole):
    config = peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True, modules_to_save=[whole])
    theirs = perturb(peft.get_peft_model(plain(base), config))
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_trained(tmp_path / "peft", base)
    assert close(logits(ours), logits(theirs))
    trained = {our_name(n) for n in trainable_state(theirs)}
    assert len(trainable_state(ours)) == len(trained)


def test_layernorm_tuning_trains_as_peft_does(base):
    theirs = peft.get_peft_model(plain(base), peft.LNTuningConfig(task_type="CAUSAL_LM")).train()
    ours = final_modify(model_name_or_path=base, modification_type="layernorm").train()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
        for m in (ours, theirs)
    ]
    for step in range(20):
        ids = token_ids(4, 12, seed=step)
        outputs = [m(input_ids=ids, labels=ids) for m in (ours, theirs)]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert close(outputs[0].logits, outputs[1].logits)


def test_bitfit_trains_every_bias_and_nothing_else(base):
    model = final_modify(model_name_or_path=base, modification_type="bitfit")
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert trainable_state(model).keys() == biases
    assert any(".ln_1." in name for name in biases) and any("c_attn" in name for name in biases)


@pytest.mark.parametrize("name", ["ia3", "ia3 and norms", "bitfit", "layernorm", "dora"])
def test_what_is_a_change_of_weights_merges(base, name, tmp_path):
    model = perturb(modified(base, **TECHNIQUES[name]), 0.05)
    expected = logits(model)
    save_trained(model, tmp_path / "trained")
    main(["--adapter_path", str(tmp_path / "trained"), "--merge_to", str(tmp_path / "merged")])
    assert close(logits(plain(tmp_path / "merged")), expected, 1e-4)
    assert not close(logits(plain(base)), expected, 1e-3)


# ---- bottleneck adapters -------------------------------------------------------------------------


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bottleneck(adapter, h, activation):
    down, up = adapter.down_proj, adapter.up_proj
    return activation(h @ down.weight.T + down.bias) @ up.weight.T + up.bias


def houlsby(adapter, x, residual):
    """Houlsby et al., 2019, section 2.1 and figure 2: x is what a sub-layer ends with."""
    return residual + x + bottleneck(adapter, x, gelu)


def pfeiffer(adapter, x, residual):
    """The adapters library's arithmetic for GPT-2, original_ln_before and residual_before_ln set
    (SeqBnConfig): pre_forward, the adapter, post_forward, all without a LayerNorm."""
    hidden_states, residual_input = x + residual, x
    output = bottleneck(adapter, hidden_states, torch.relu) + residual_input
    return output + residual


def forward_by_hand(model, ids, dropout):
    """GPT-2's logits written out, with the adapters that each block holds."""
    body, (rows, length) = model.transformer, ids.shape

    def normed(norm, h):
        return F.layer_norm(h, (HIDDEN,), norm.weight, norm.bias)

    def dense(layer, h):
        return h @ layer.weight + layer.bias

    h = body.wte.weight[ids] + body.wpe.weight[:length]
    for block in body.h:
        adapters = [module for module in block.modules() if isinstance(module, BottleneckAdapter)]
        x = dense(block.attn.c_attn, normed(block.ln_1, h))
        q, k, v = (part.view(rows, length, 4, -1).transpose(1, 2) for part in x.chunk(3, dim=-1))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = dense(block.attn.c_proj, x.transpose(1, 2).reshape(rows, length, HIDDEN))
        x = F.dropout(x, dropout)
        h = houlsby(adapters[0], x, h) if len(adapters) == 2 else h + x
        x = dense(block.mlp.c_proj, gelu(dense(block.mlp.c_fc, normed(block.ln_2, h))))
        h = (houlsby if len(adapters) == 2 else pfeiffer)(adapters[-1], F.dropout(x, dropout), h)
    return normed(body.ln_f, h) @ body.wte.weight.T


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("placement", "per_block"), [("pfeiffer", 1), ("houlsby", 2)])
def test_adapters_stand_where_the_papers_put_them(placement, per_block, dropout):
    model = perturb(apply_adapters(small(resid_pdrop=dropout), 8, placement=placement), 0.2).train()
    assert (
        sum(isinstance(module, BottleneckAdapter) for module in model.modules())
        == per_block * LAYERS
    )
    torch.manual_seed(4)
    expected = forward_by_hand(model, token_ids(), dropout)
    torch.manual_seed(4)
    assert close(model(input_ids=token_ids()).logits, expected)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_an_adapter_s_activation_is_the_one_that_is_named(name):
    model = perturb(apply_adapters(small(), 8, activation=name), 0.2)
    functions = {"relu": torch.relu, "gelu": gelu, "silu": lambda x: x * torch.sigmoid(x)}
    adapter, h = model.transformer.h[1].adapter, torch.randn(3, HIDDEN)
    assert close(adapter(h), h + bottleneck(adapter, h, functions[name]))


def test_an_adapter_of_an_earlier_version_is_refused_by_what_it_lacks(base, tmp_path):
    save_trained(modified(base, **TECHNIQUES["pfeiffer"]), tmp_path)
    settings = modify_llm.read_json(tmp_path / "modification.json")
    del settings["adapter_activation"]  # they had none, and "pfeiffer" was another architecture
    modify_llm.write_json(tmp_path / "modification.json", settings)
    with pytest.raises(ValueError, match=r"json: adapters of an earlier version"):
        load_trained(tmp_path)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_adapters_start_as_the_exact_identity_and_are_all_that_trains(placement):
    base = small()
    model = apply_adapters(copy.deepcopy(base), 8, placement=placement)
    assert torch.equal(logits(model), logits(base))
    one = 8 * HIDDEN + 8 + HIDDEN * 8 + HIDDEN
    adapters = LAYERS * (2 if placement == "houlsby" else 1)
    assert parameter_counts(model) == (base.num_parameters() + adapters * one, adapters * one)
    assert set(base.state_dict()) <= set(model.state_dict())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "up_proj.weight" in n)


# ---- prefixes ------------------------------------------------------------------------------------

PREFIXES = {name: settings for name, settings in TECHNIQUES.items() if "prefix" in name}
every_prefix = pytest.mark.parametrize("settings", PREFIXES.values(), ids=PREFIXES.keys())
both_prefixes = pytest.mark.parametrize("prefix_type", ["embedding", "key_value"])
START = [7, 250, 31, 4, 112, 5]  # real tokens to start a prefix from


def prefixed(prefix_type, model=None, noise=0.5, **settings):
    settings = {"init_ids": START, "prefix_length": LENGTH, **settings}
    return perturb(
        apply_prefix(small() if model is None else model, prefix_type=prefix_type, **settings),
        noise,
    )


def after_tokens(model, tokens, ids):
    """A plain model's logits on the text, with real tokens put before it."""
    start = torch.tensor(tokens).expand(len(ids), -1)
    return logits(model, torch.cat([start, ids], 1))[:, len(tokens) :]


@pytest.mark.parametrize(
    "start", [START, [7, 250, 31, 31, 112, 7], [7, 250]], ids=["distinct", "repeated", "too few"]
)
@pytest.mark.parametrize(
    ("prefix_type", "projection_size", "relative"),
    [("embedding", 0, 1e-5), ("key_value", 0, 1e-5), ("key_value", 40, 1e-3)],
    ids=["embedding", "key_value", "reparametrised"],
)
def test_a_prefix_starts_as_the_real_tokens_it_is_made_of(
    prefix_type, projection_size, relative, start
):
    base = small()
    settings = {"noise": 0, "projection_size": projection_size, "init_ids": start}
    model = prefixed(prefix_type, copy.deepcopy(base), **settings)
    tokens = (start * LENGTH)[:LENGTH]
    assert close(logits(model), after_tokens(base, tokens, token_ids()), relative)
    assert not close(logits(model), logits(base), 0.1)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
def test_an_embedding_prefix_has_the_logits_and_gradients_of_concatenated_embeddings(
    dtype, relative
):
    """The prefix is computed once for the batch; plainly, it stands before each row."""
    beside = ["wte", "wpe", "ln_1", "mlp.c_proj", "ln_f"]
    model = prefixed("embedding", noise=0.3, trainable_modules=beside).to(dtype).train()
    reference = small().to(dtype).train()
    reference.load_state_dict({n: p for n, p in model.state_dict().items() if "prefix" not in n})
    ids = token_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 3:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)

    prefix = model.transformer.prefix.embedding.detach().clone().requires_grad_()
    whole = reference(
        inputs_embeds=torch.cat([prefix.expand(3, -1, -1), reference.transformer.wte(ids)], 1),
        attention_mask=F.pad(mask, (LENGTH, 0), value=1),
        # the loss is over the text alone, where nothing before the first token predicts it
        labels=F.pad(labels[:, 1:], (LENGTH + 1, 0), value=-100),
    )
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    real = mask.bool()
    assert close(output.logits[real], whole.logits[:, LENGTH:][real], relative)
    assert output.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)

    output.loss.backward()
    whole.loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    expected["transformer.prefix.embedding"] = prefix.grad
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 1 + 2 + LAYERS * (2 + 2) + 2
    for name, gradient in trained.items():
        assert close(gradient, expected[name], relative), name


@both_prefixes
def test_the_base_s_dropout_stays_out_of_a_prefix_s_start(prefix_type):
    base = small(embd_pdrop=0.5, resid_pdrop=0.5)
    model = apply_prefix(
        copy.deepcopy(base).train(), LENGTH, prefix_type=prefix_type, init_ids=START
    )
    assert model.training
    assert close(logits(model), after_tokens(base, START, token_ids()))


def test_a_prefix_starts_from_real_tokens_by_default():
    base = small()
    model = apply_prefix(copy.deepcopy(base), 4)
    rows = model.transformer.prefix.prompt_embeddings()[:, None] == base.transformer.wte.weight
    assert rows.all(-1).any(-1).all() and len(set(rows.all(-1).nonzero()[:, 1].tolist())) == 4


def test_a_prefix_starts_from_the_words_of_a_text_read_by_the_base_s_tokenizer(tmp_path):
    small().save_pretrained(tmp_path)
    flags = {"modification_type": "prefix", "prefix_init_text": "low lower"}
    with pytest.raises(ValueError, match=r"--prefix_init_text 'low lower': .*no tokenizer"):
        modified(str(tmp_path), **flags)
    vocabulary = {"low": 5, "er": 9, "l": 1, "o": 2, "w": 3, "e": 4, "r": 6}
    merges = [("l", "o"), ("lo", "w"), ("e", "r")]
    backend = Tokenizer(BPE({**vocabulary, "lo": 7}, merges))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    model = modified(str(tmp_path), **flags)
    words = model.transformer.wte.weight[[5, 5, 9] * (LENGTH // 3)]
    assert torch.equal(model.transformer.prefix.embedding, words)
    save_trained(model, tmp_path / "run")
    (tmp_path / "tokenizer.json").unlink()  # loading needs no words
    assert torch.equal(load_trained(tmp_path / "run").transformer.prefix.embedding, words)


STRIDES = 8


def counting_rows(generator, rows, stride=None):
    """Rows that count modulo 32 in steps of a stride; a random stride stands in the first token."""
    strides = (
        torch.randint(1, STRIDES + 1, (rows, 1), generator=generator) if stride is None else stride
    )
    counted = (torch.randint(32, (rows, 1), generator=generator) + strides * torch.arange(12)) % 32
    return counted if stride is not None else torch.cat([32 + strides, counted], 1)


@pytest.fixture(scope="module")
def counting_base():
    """A model that has learnt what each of the tokens 33 to 40 asks it to do."""
    model = tiny_gpt2(vocab_size=48, n_positions=32, bos_token_id=0, eos_token_id=0).train()
    generator, optimizer = (
        torch.Generator().manual_seed(0),
        torch.optim.AdamW(model.parameters(), 3e-3),
    )
    for _ in range(300):
        ids = counting_rows(generator, 32)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefix_type": "key_value"}, {"prefix_type": "key_value", "projection_size": 32}],
    ids=["embedding", "key_value", "reparametrised"],
)
def test_a_real_start_trains_faster_than_a_random_one(counting_base, settings):
    def mean_loss(seed=0, random_std=None):
        torch.manual_seed(seed)
        model = apply_prefix(copy.deepcopy(counting_base), 4, init_ids=[33, 35, 39, 34], **settings)
        if random_std:
            for parameter in trainable_state(model).values():
                nn.init.normal_(parameter, std=random_std)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(20):
            # Token 37 would ask for this stride; it is not among those that the prefix starts from.
            ids = counting_rows(generator, 16, stride=5)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    for std in (0.02, 1.0):
        assert mean_loss() < 0.5 * sum(mean_loss(seed, std) for seed in range(3)) / 3


@both_prefixes
def test_a_missing_attention_mask_means_that_all_tokens_count(prefix_type):
    model = prefixed(prefix_type)
    assert close(logits(model), logits(model, attention_mask=torch.ones_like(token_ids())), 1e-6)


@both_prefixes
def test_right_padding_leaves_each_row_as_it_is_alone(prefix_type):
    model, ids = prefixed(prefix_type), token_ids(3, 9)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 5, 2)):
        mask[row, length:] = 0
    padded = logits(model, ids, attention_mask=mask)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    losses = []
    for row, length in enumerate((9, 5, 2)):
        alone = logits(model, ids[row : row + 1, :length])
        assert close(padded[row, :length], alone[0], 1e-5)
        losses += F.cross_entropy(alone[0, :-1], ids[row, 1:length], reduction="none").tolist()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def generated(model, ids, **settings):
    torch.manual_seed(5)
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        **settings,
    }
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **settings})


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beams", "several samples"],
)
@both_prefixes
def test_generation_sees_the_prefix_as_it_would_the_tokens_it_is_made_of(
    prefix_type, decoding, use_cache
):
    base, ids = small(), token_ids(2, 5)
    model = prefixed(prefix_type, copy.deepcopy(base), noise=0)
    start = torch.tensor(START).expand(2, -1)
    expected = generated(base, torch.cat([start, ids], 1), **decoding)[:, LENGTH:]
    assert torch.equal(generated(model, ids, use_cache=use_cache, **decoding), expected)
    assert not torch.equal(generated(base, ids, **decoding), expected)


@both_prefixes
def test_hidden_states_and_attentions_are_those_of_the_text_behind_the_prefix(prefix_type):
    base, ids = small(attn_implementation="eager"), token_ids(2, 5)
    expected = base(
        torch.cat([torch.tensor(START).expand(2, -1), ids], 1), output_hidden_states=True
    )
    model = prefixed(prefix_type, base, noise=0)
    output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == LAYERS + 1
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert close(ours, theirs[:, LENGTH:])
    assert [weights.shape[2:] for weights in output.attentions] == [(5, LENGTH + 5)] * LAYERS
    chosen = model(input_ids=ids, output_hidden_states=[1]).hidden_states
    assert torch.equal(chosen[1], output.hidden_states[1]) and chosen[0] is None


@pytest.mark.parametrize("use_cache", [True, False])
@both_prefixes
def test_rows_padded_on_the_left_generate_as_they_do_alone(prefix_type, use_cache):
    model, ids = prefixed(prefix_type), token_ids(3, 7)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 5)):
        mask[row, :pads] = 0
    together = generated(model, ids * mask, attention_mask=mask, use_cache=use_cache)
    for row, pads in enumerate((0, 3, 5)):
        assert torch.equal(
            together[row, 7:], generated(model, ids[row : row + 1, pads:])[0, 7 - pads :]
        )


@both_prefixes
def test_text_and_prefix_fill_the_positions_and_no_more(prefix_type):
    model, room = prefixed(prefix_type), POSITIONS - LENGTH
    assert logits(model, token_ids(1, room)).isfinite().all()
    with pytest.raises(ValueError, match=f"{POSITIONS + 1} tokens.* {POSITIONS} positions"):
        logits(model, token_ids(1, room + 1))
    with pytest.raises(ValueError, match=f"{POSITIONS} positions"):
        generated(model, token_ids(1, room - 3), max_new_tokens=8)
    with pytest.raises(ValueError, match=f"prefix_length {POSITIONS}"):
        apply_prefix(small(), POSITIONS)


@every_prefix
def test_the_loss_of_a_prefixed_model_is_over_the_text_alone(settings, base):
    model = perturb(modified(base, **settings))
    ids = token_ids()
    expected = F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@every_prefix
def test_every_virtual_token_gets_a_gradient(settings, base):
    model = modified(base, **settings)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(
        p.grad.flatten(1).any(1).all()
        for n, p in model.named_parameters()
        if n.endswith("embedding")
    )
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_the_reparametrisation_is_computed_out_when_saved(base, tmp_path):
    model = perturb(modified(base, **TECHNIQUES["reparametrised prefix"]))
    save_trained(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "prompt_embeddings": (LENGTH, LAYERS * 2 * HIDDEN)
    }
    loaded = load_trained(tmp_path)
    assert parameter_counts(loaded)[1] == LENGTH * LAYERS * 2 * HIDDEN
    assert close(logits(loaded), logits(model))


# ---- selective and full --------------------------------------------------------------------------


def trained_modules(model):
    """Which blocks and which modules outside them hold trainable parameters."""
    names = {name.removeprefix("transformer.") for name in trainable_state(model)}
    return {
        ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]
        for name in names
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"freeze_layers": "0-1"}, {"h.2", "wte", "ln_f"}),
        ({"freeze_layers": [0, 2]}, {"h.1", "wte", "ln_f"}),
        ({"freeze_layers": [], "freeze_head": True}, {"h.0", "h.1", "h.2"}),
        (
            {"freeze_layers": [1], "freeze_head": True, "trainable_modules": ["wpe"]},
            {"h.0", "h.2", "wpe"},
        ),
        ({"freeze_layers": "0-2", "freeze_head": True, "trainable_modules": "ln_f"}, {"ln_f"}),
    ],
)
def test_selective_freezing_trains_the_other_blocks_and_the_head(base, settings, expected):
    model = modified(base, modification_type="selective", **settings)
    assert trained_modules(model) == expected
    blocks = [set(trainable_state(block)) for block in model.transformer.h]
    assert all(not names or len(names) == 12 for names in blocks)


@pytest.mark.parametrize(
    ("layers", "said"), [([0, 3], "3: the model has layers 0 to 2"), ([-1], "'-1': expected")]
)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(layers, said):
    with pytest.raises(ValueError, match=f"--freeze_layers {said}"):
        apply_selective_freezing(small(), layers)


def test_full_finetuning_trains_everything(base):
    model = modified(base, modification_type="full")
    assert set(trainable_state(model)) == set(dict(model.named_parameters()))


def test_the_optimizer_holds_no_state_for_frozen_weights(base):
    model = modified(base, modification_type="selective", freeze_layers=[0, 1])
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    held = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert held == set(trainable_state(model)) and len(held) == 12 + 3


@pytest.mark.parametrize(
    ("freeze_head", "reached"), [(True, [False, False, True]), (False, [True, True, True])]
)
def test_backward_stops_below_the_lowest_layer_that_trains(base, freeze_head, reached):
    model = modified(
        base, modification_type="selective", freeze_layers=[0, 1], freeze_head=freeze_head
    )
    fired = {}

    def watch(i):
        def hook(module, inputs, output):
            fired[i] = False
            if output.requires_grad:
                output.register_hook(lambda _: fired.__setitem__(i, True))

        return hook

    for i, block in enumerate(model.transformer.h):
        block.register_forward_hook(watch(i))
    model.transformer.wte.register_forward_hook(watch("wte"))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert [fired[i] for i in range(LAYERS)] == reached and fired["wte"] is not freeze_head


# ---- all techniques ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ln_f"], {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        (["h.1.ln_2"], {"transformer.h.1.ln_2.weight", "transformer.h.1.ln_2.bias"}),
        (
            ["ln_1"],
            {
                f"transformer.h.{i}.ln_1.{kind}"
                for i in range(LAYERS)
                for kind in ("weight", "bias")
            },
        ),
        (["wte", "wpe"], {"transformer.wte.weight", "transformer.wpe.weight"}),
        (["lm_head"], {"transformer.wte.weight"}),
        (
            ["mlp.c_proj"],
            {
                f"transformer.h.{i}.mlp.c_proj.{kind}"
                for i in range(LAYERS)
                for kind in ("weight", "bias")
            },
        ),
    ],
)
@pytest.mark.parametrize(
    "apply",
    [
        lambda model, **extra: apply_lora(model, target_modules=["c_attn"], **extra),
        apply_adapters,
        lambda model, **extra: apply_prefix(model, LENGTH, **extra),
        lambda model, **extra: apply_prefix(model, LENGTH, prefix_type="key_value", **extra),
    ],
    ids=["lora", "adapter", "embedding prefix", "key_value prefix"],
)
def test_trainable_modules_train_besides_the_technique_s_own(apply, names, expected):
    own = set(trainable_state(apply(small())))
    assert set(trainable_state(apply(small(), trainable_modules=names))) == own | expected


@pytest.mark.parametrize("suffix", ["c_attn", "attn", "h", "h.2.attn.c_attn"])
def test_a_module_is_wrapped_by_lora_or_trained_in_full_not_both(suffix):
    with pytest.raises(ValueError, match=rf"--trainable_modules {suffix}: .*wrapped by LoRA"):
        apply_lora(small(), target_modules=["c_attn"], trainable_modules=[suffix])


def test_a_trainable_module_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(
        ValueError, match=r"--trainable_modules ln_3: matches nothing.*ln_1.*ln_f.*wte"
    ):
        apply_adapters(small(), trainable_modules=["ln_3"])


@every_technique
def test_a_second_technique_on_the_same_model_is_refused(base, settings):
    with pytest.raises(
        ValueError, match=f"carries {settings.get('modification_type', 'lora')} already"
    ):
        apply_adapters(modified(base, **settings))


def test_a_second_lora_is_refused_as_such_and_the_model_works_on():
    model = perturb(apply_lora(small()))
    expected, trained = logits(model), set(trainable_state(model))
    with pytest.raises(ValueError, match=r"^the model carries lora already"):
        apply_lora(model)
    assert torch.equal(logits(model), expected) and set(trainable_state(model)) == trained
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert close(logits(merge_lora(model)), expected, 1e-4)


@pytest.mark.parametrize(
    ("apply", "wrong", "message"),
    [
        (apply_lora, {"rank": 0}, "--lora_rank '0': expected int >= 1"),
        (apply_lora, {"rank": 2.5}, "--lora_rank '2.5': expected int >= 1"),
        (apply_lora, {"alpha": 0}, "--lora_alpha '0': expected float"),
        (apply_lora, {"dropout": 1.0}, "--lora_dropout '1.0': expected float >= 0 and < 1"),
        (apply_adapters, {"adapter_size": 0}, "--adapter_size '0': expected int >= 1"),
        (apply_adapters, {"placement": "other"}, "--adapter_placement 'other': expected one of"),
        (
            apply_prefix,
            {"prefix_length": POSITIONS},
            f"--prefix_length {POSITIONS}: leaves no room",
        ),
        (apply_prefix, {"prefix_type": "other"}, "--prefix_type 'other': expected one of"),
        (apply_prefix, {"projection_size": 8}, "--prefix_projection_size 8: needs --prefix_type"),
        (
            apply_prefix,
            {"projection_size": -8, "prefix_type": "key_value"},
            "--prefix_projection_size '-8': expected int >= 0",
        ),
        (apply_selective_freezing, {"freeze_layers": [LAYERS]}, "--freeze_layers 3: the model has"),
    ],
)
def test_the_functions_check_their_arguments_by_the_flags_and_leave_the_model_as_it_was(
    monkeypatch, apply, wrong, message
):
    monkeypatch.setattr(argparse, "ArgumentParser", None)  # the ranges need no parser
    model = small()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        apply(model, **wrong)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(small()))
    apply_lora(model)  # nothing stands in the way of another try


@pytest.mark.parametrize(
    "options", [None, {"use_reentrant": False}], ids=["default", "not reentrant"]
)
@every_technique
def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(base, settings, options):
    model = perturb(modified(base, **settings)).train()
    models = [model, copy.deepcopy(model)]
    models[1].gradient_checkpointing_enable(options)
    if settings.get("modification_type") == "prefix":
        reason = "gradient checkpointing drops the cache that carries a prefix"
        with pytest.raises(ValueError, match=reason):
            models[1](input_ids=token_ids(), labels=token_ids())
        assert close(logits(models[1]), logits(models[0]))
        return
    for model in models:
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.requires_grad:
            assert b.grad is not None and close(b.grad, a.grad), name


@every_technique
def test_bf16_autocast_stays_near_fp32(base, settings):
    model, ids = perturb(modified(base, **settings), 0.02), token_ids()
    exact = model(input_ids=ids, labels=ids).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.03)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("name", ["lora", "lora on thirds", "houlsby", *PREFIXES])
def test_a_frozen_base_in_bf16_carries_an_fp32_technique(base, name):
    model, ids = perturb(modified(base, **TECHNIQUES[name]), 0.02), token_ids()
    exact = model(input_ids=ids, labels=ids).loss.item()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.03)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert generated(model, ids, max_new_tokens=3).shape == (2, 12)


@every_technique
def test_hugging_face_s_trainer_trains_what_is_trainable_and_nothing_else(base, settings, tmp_path):
    model = modified(base, **settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = token_ids(6, 8)
    labels = ids.clone()
    labels[:, 0] = -100  # nothing predicts it, and Trainer would count it
    rows = [
        {"input_ids": a, "attention_mask": torch.ones_like(a), "labels": b}
        for a, b in zip(ids, labels, strict=True)
    ]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    after = dict(model.named_parameters())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == set(trainable_state(model))
    expected = model(input_ids=ids, labels=labels).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


# ---- the table of techniques ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "apply"),
    [
        ("lora", apply_lora),
        ("adapter", apply_adapters),
        ("prefix", apply_prefix),
        ("selective", apply_selective_freezing),
        ("full", apply_full_finetuning),
    ],
)
def test_the_functions_have_the_defaults_of_the_flags(technique, apply):
    sizes = {"n_layer": 5, "n_positions": 64}  # room for every default
    row = modify_llm.TECHNIQUES[technique]
    flags = {name: flag.default for name, flag in row.flags.items() if name != "prefix_init_text"}
    by_function = apply(small(**sizes))
    if technique == "selective":  # the lower half of this model
        flags["freeze_layers"] = [0, 1]
    if technique == "adapter":  # Pfeiffer's
        flags["adapter_activation"] = "relu"
    noted = {"modification_type": technique, "trainable_modules": [], **flags}
    assert by_function.modification == noted
    by_flags = row.apply(small(**sizes), modify_llm.with_defaults(modification_type=technique))
    assert by_flags.modification == noted
    shapes = [{n: p.shape for n, p in trainable_state(m).items()} for m in (by_function, by_flags)]
    assert shapes[0] == shapes[1]


# ---- final_modify --------------------------------------------------------------------------------


def test_a_namespace_may_hold_some_of_the_flags_only(base):
    args = argparse.Namespace(
        model_name_or_path=base, lora_rank=2, learning_rate=1e-3, lora_target_modules="c_fc"
    )
    model = final_modify(args)
    assert parameter_counts(model)[1] == LAYERS * 2 * (HIDDEN + 4 * HIDDEN)
    assert vars(args).keys() == {
        "model_name_or_path",
        "lora_rank",
        "learning_rate",
        "lora_target_modules",
    }


def test_a_dataclass_will_do_and_keywords_stand_above_it(base):
    @dataclasses.dataclass
    class Config:
        model_name_or_path: str
        modification_type: str = "prefix"
        prefix_length: int = 7

    assert parameter_counts(final_modify(Config(base)))[1] == 7 * HIDDEN
    assert parameter_counts(final_modify(Config(base), prefix_length=5))[1] == 5 * HIDDEN


def test_the_model_comes_in_fp32_and_called_like_any_gpt2(base):
    model = final_modify(model_name_or_path=base)
    assert isinstance(model, GPT2LMHeadModel) and {p.dtype for p in model.parameters()} == {
        torch.float32
    }
    output = model(
        input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()), labels=token_ids()
    )
    assert output.loss.ndim == 0 and output.logits.shape == (2, 9, VOCAB)
    assert torch.equal(output.logits, logits(plain(base)))


def test_an_unknown_keyword_is_a_type_error(base):
    with pytest.raises(TypeError, match="lora_rnak"):
        final_modify(model_name_or_path=base, lora_rnak=3)


def test_a_wrong_value_has_the_same_words_from_python_and_from_the_script(capsys):
    with pytest.raises(ValueError, match=r"^--lora_rank '0': expected int >= 1$"):
        final_modify(lora_rank=0)
    message = refused(capsys, ["--lora_rank", "0", "--adapter_size", "-1"])
    assert message == "argument --lora_rank: '0': expected int >= 1"


def test_dropout_is_off_unless_asked_for(tmp_path):
    small(attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1).save_pretrained(tmp_path)
    still = final_modify(model_name_or_path=str(tmp_path)).train()
    assert torch.equal(still(input_ids=token_ids()).logits, still(input_ids=token_ids()).logits)
    dropping = final_modify(model_name_or_path=str(tmp_path), dropout=0.5).train()
    assert not close(dropping(input_ids=token_ids()).logits, logits(still), 0.1)
    assert torch.equal(logits(dropping), logits(still))


def test_random_weights_are_said_loudly(caplog):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = final_modify(from_scratch=True, max_position_embeddings=32, **sizes)
    assert model.config.n_layer == 2 and model.transformer.wpe.weight.shape == (32, 16)
    assert any(
        "random" in record.message.lower() and record.levelname == "WARNING"
        for record in caplog.records
    )


# ---- saving and loading --------------------------------------------------------------------------

LN = ["ln_1", "ln_2", "ln_f"]
SAVED = {
    **TECHNIQUES,
    "lora on one third": {"lora_target_modules": ["c_attn.k"], "lora_rank": 3, "lora_alpha": 5},
    "lora on all thirds": {"lora_target_modules": ["c_attn.v", "c_attn.q", "c_attn.k"]},
    "lora on a third and a layer": {
        "lora_target_modules": ["c_attn.v", "mlp.c_fc"],
        "lora_rank": 3,
    },
    "lora on one layer": {"lora_target_modules": ["h.1.mlp.c_proj"], "lora_rank": 1},
    "lora and embeddings": {"trainable_modules": ["wte"]},
    "lora and head": {"trainable_modules": ["lm_head"]},
    "lora and all that is not wrapped": {"trainable_modules": ["wte", "wpe", *LN]},
    "lora and a whole layer": {
        "lora_target_modules": ["c_attn"],
        "trainable_modules": ["mlp.c_proj"],
    },
    "thirds, embeddings and norms": {
        "lora_target_modules": ["c_attn.q"],
        "trainable_modules": ["wte", *LN],
    },
    "houlsby and norms": {**TECHNIQUES["houlsby"], "trainable_modules": LN},
    "adapter and embeddings": {**TECHNIQUES["pfeiffer"], "trainable_modules": ["wte"]},
    "embedding prefix and norms": {**TECHNIQUES["embedding prefix"], "trainable_modules": LN},
    "key_value prefix and embeddings": {
        **TECHNIQUES["key_value prefix"],
        "trainable_modules": ["wte", "ln_f"],
    },
    "selective and positions": {**TECHNIQUES["selective"], "trainable_modules": ["wpe"]},
}
every_saved = pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED.keys())


@every_saved
def test_what_was_saved_loads_with_equal_logits_and_trains_on(base, settings, tmp_path):
    model = perturb(modified(base, **settings))
    save_trained(model, tmp_path / "first")
    loaded = load_trained(tmp_path / "first")
    assert close(logits(loaded), logits(model), 1e-6) and not close(
        logits(loaded), logits(plain(base)), 1e-2
    )
    if "prefix_projection_size" not in settings:
        assert set(trainable_state(loaded)) == set(trainable_state(model))
        assert parameter_counts(loaded) == parameter_counts(model)
    perturb(loaded, 0.03)
    save_trained(loaded, tmp_path / "second")
    assert close(logits(load_trained(tmp_path / "second")), logits(loaded), 1e-6)


def peft_knows(settings):
    return settings.get("modification_type", "lora") in ("lora", "prefix")


@pytest.mark.parametrize(
    "settings",
    [v for v in SAVED.values() if peft_knows(v)],
    ids=[k for k, v in SAVED.items() if peft_knows(v)],
)
def test_peft_loads_what_was_saved_with_equal_logits(base, settings, tmp_path):
    model = perturb(modified(base, **settings))
    save_trained(model, tmp_path)
    with warnings.catch_warnings():
        # PEFT would correct a wrong one, with a warning a layer.
        warnings.filterwarnings("error", message="fan_in_fan_out")
        theirs = peft.PeftModel.from_pretrained(plain(base), tmp_path)
    inputs = {"attention_mask": torch.ones_like(token_ids())}
    assert close(logits(theirs, **inputs)[:, -9:], logits(model), 1e-5)


def test_peft_loads_lora_on_conv1d_and_linear_layers_together(tmp_path):
    base = small(tie_word_embeddings=False)
    model = perturb(apply_lora(copy.deepcopy(base), target_modules=["c_fc", "lm_head"]))
    save_trained(model, tmp_path)
    assert close(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(model), 1e-5)


@pytest.mark.parametrize(
    "settings",
    [v for v in SAVED.values() if v.get("modification_type") in ("selective", "full")],
    ids=[k for k, v in SAVED.items() if v.get("modification_type") in ("selective", "full")],
)
def test_selective_and_full_are_saved_as_plain_models(base, settings, tmp_path):
    model = perturb(modified(base, **settings))
    save_trained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        type(loaded) is GPT2LMHeadModel and loaded.lm_head.weight is loaded.transformer.wte.weight
    )
    assert close(logits(loaded), logits(model), 1e-6)


@pytest.mark.parametrize(
    "apply",
    [
        apply_lora,
        apply_adapters,
        lambda model: apply_prefix(model, LENGTH),
        lambda model: apply_prefix(model, LENGTH, prefix_type="key_value", projection_size=16),
        lambda model: apply_selective_freezing(model, [1]),
        apply_full_finetuning,
    ],
    ids=["lora", "adapters", "embedding prefix", "key_value prefix", "selective", "full"],
)
def test_a_model_of_one_s_own_is_saved_and_loaded_on_the_base_that_is_named(base, apply, tmp_path):
    model = perturb(apply(plain(base)))
    save_trained(model, tmp_path)
    assert close(logits(load_trained(tmp_path, base)), logits(model), 1e-6)
    if not (tmp_path / "config.json").exists():
        with pytest.raises(ValueError, match="base model; give --model_name_or_path"):
            load_trained(tmp_path)


UNTIED = {
    "lora on the head": {"lora_target_modules": ["c_fc", "lm_head"]},
    "lora and embeddings": {"trainable_modules": ["wte"]},
    "lora and head": {"trainable_modules": ["lm_head"]},
    "adapter and head": {**TECHNIQUES["pfeiffer"], "trainable_modules": ["lm_head"]},
    "prefix and embeddings": {**TECHNIQUES["embedding prefix"], "trainable_modules": ["wte"]},
    "selective": TECHNIQUES["selective"],
    "full": TECHNIQUES["full"],
}


@pytest.mark.parametrize("settings", UNTIED.values(), ids=UNTIED.keys())
def test_a_head_of_its_own_is_saved_and_loaded_apart_from_the_embeddings(tmp_path, settings):
    small(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = perturb(modified(str(tmp_path / "base"), **settings))
    save_trained(model, tmp_path / "final")
    loaded = load_trained(tmp_path / "final")
    assert close(logits(loaded), logits(model), 1e-6) and set(trainable_state(loaded)) == set(
        trainable_state(model)
    )
    technique = settings.get("modification_type", "lora")
    if technique == "lora":
        theirs = peft.PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "final")
        assert close(logits(theirs), logits(model), 1e-5)
        assert close(logits(merge_lora(loaded)), logits(model), 1e-4)
    elif technique in ("selective", "full"):
        assert close(logits(plain(tmp_path / "final")), logits(model), 1e-6)


PEFT_MADE = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 9},
    "biases of all layers": {"bias": "all"},
    "biases of the wrapped layers": {"bias": "lora_only"},
    "final norm": {"modules_to_save": ["ln_f"]},
    "embeddings": {"modules_to_save": ["wte"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings and head": {"modules_to_save": ["wte", "lm_head"]},
    "patterns": {
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "rank_pattern": {"attn.c_proj": 2, r"h\.1\.mlp\.c_fc": 5},
        "alpha_pattern": {"mlp.c_proj": 40, r"h\.[02]\.attn\.c_attn": 3},
    },
    "patterns under rslora": {
        "use_rslora": True,
        "rank_pattern": {"c_attn": 2},
        "alpha_pattern": {"c_attn": 3},
    },
    "patterns of which two match": {
        "target_modules": ["c_proj"],
        "alpha_pattern": {"c_proj": 4, "mlp.c_proj": 40},
    },
    "a container that is trained whole": {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]},
    "regular expression": {"target_modules": r".*\.h\.[02]\.(attn|mlp)\.c_(attn|fc)"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "h"},
    "all linear layers": {"target_modules": "all-linear"},
    "all but some layers": {
        "target_modules": ["c_attn", "c_proj"],
        "exclude_modules": ["mlp.c_proj"],
    },
    "a target that is trained whole": {
        "target_modules": ["c_attn", "c_proj"],
        "modules_to_save": ["mlp.c_proj"],
    },
    "embeddings and head, tied": {"modules_to_save": ["wte"], "ensure_weight_tying": True},
    "alpha not given": {"lora_alpha": None},
}


def peft_made(base, directory, **config):
    """A LoRA directory that PEFT itself trained (here: perturbed) and wrote."""
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "mlp.c_proj"], **config}
    config = {name: value for name, value in config.items() if value is not None}
    model = peft.get_peft_model(
        plain(base), peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **config)
    )
    perturb(model).save_pretrained(directory)
    return model


@pytest.mark.parametrize("config", PEFT_MADE.values(), ids=PEFT_MADE.keys())
def test_a_lora_that_peft_made_loads_with_equal_logits_and_trains_on(base, config, tmp_path):
    theirs = peft_made(base, tmp_path / "peft", **config)
    ours = load_trained(tmp_path / "peft")  # PEFT wrote down the base's directory
    assert close(logits(ours), logits(theirs), 1e-5) and not close(
        logits(ours), logits(plain(base)), 1e-2
    )
    trained = {
        re.sub(
            r"\.modules_to_save\.default|\.default\.weight",
            "",
            name.removeprefix("base_model.model."),
        )
        for name in trainable_state(theirs)
    }
    assert set(trainable_state(ours)) == {
        name.replace(".base_layer", ".original_layer") for name in trained
    }
    perturb(ours, 0.03)
    save_trained(ours, tmp_path / "again")
    expected = logits(ours)
    assert close(logits(load_trained(tmp_path / "again")), expected, 1e-6)
    assert peft.PeftConfig.from_pretrained(tmp_path / "again").bias == config.get("bias", "none")
    assert close(
        logits(peft.PeftModel.from_pretrained(plain(base), tmp_path / "again")), expected, 1e-5
    )
    assert close(logits(merge_lora(ours)), expected, 1e-4)


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 32)])
def test_a_lora_layer_takes_what_the_layer_that_it_wraps_takes(shape):
    layer = LoRALayer(torch.nn.Linear(32, 6).requires_grad_(False), 2, 4.0)
    x = torch.randn(shape, requires_grad=True)
    expected = layer.original_layer(x)
    assert layer(x).shape == expected.shape
    layer(x).sum().backward()
    assert close(layer(x), expected) or not x.numel()


@pytest.mark.parametrize("prefix_type", ["embedding", "key_value"])
def test_a_prefix_on_a_base_in_bf16_runs_under_autocast(base, prefix_type):
    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        apply_prefix(model, 5, prefix_type=prefix_type)
        inside = logits(model)
    assert close(inside.float(), logits(model).float(), 0.05)


def test_settings_that_are_null_files_that_are_empty_and_places_that_are_not_there_are_told(
    base, tmp_path
):
    path = base_with(base, tmp_path / "null", quantization_config=None)
    assert close(logits(modified(path, modification_type="full")), logits(plain(base)))
    (Path(path) / "model.safetensors").unlink()
    (Path(path) / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: damaged"):
        modified(path)
    (Path(path) / "config.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="git lfs pull"):
        modified(path)
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        load_trained(tmp_path / "nowhere")
    save_trained(modified(base), tmp_path / "final")
    settings = json.loads((tmp_path / "final" / "modification.json").read_text())
    settings["base_model_name_or_path"] = "gone/away"
    (tmp_path / "final" / "modification.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^the base of \S+final: --model_name_or_path gone/away"):
        load_trained(tmp_path / "final")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_a_lora_that_peft_put_on_a_head_of_its_own_loads_with_equal_logits(tmp_path, bias):
    small(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    theirs = peft_made(
        tmp_path / "base", tmp_path / "peft", target_modules=["c_fc", "lm_head"], bias=bias
    )
    ours = load_trained(tmp_path / "peft")
    assert close(logits(ours), logits(theirs), 1e-5)
    assert len(trainable_state(ours)) == len(trainable_state(theirs))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", fan_in_fan_out=True),
            "pissa",
        ),
        (
            peft.LoraConfig(
                task_type="CAUSAL_LM", trainable_token_indices=[5], fan_in_fan_out=True
            ),
            "trainable_token",
        ),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (peft.LNTuningConfig(task_type="CAUSAL_LM"), "LN_TUNING"),
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["wte"]), "wte"),
    ],
    ids=["pissa", "single tokens", "prompt tuning", "layernorms", "lora on an embedding"],
)
def test_what_peft_made_and_we_do_not_support_is_refused_by_name(base, config, reason, tmp_path):
    peft.get_peft_model(plain(base), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_trained(tmp_path, base)


# the file that holds a technique's tensors, and those that it must hold, all of them
DAMAGED = {
    "lora": ("lora", "adapter_model.safetensors"),
    "lora and norms": ("lora and all that is not wrapped", "adapter_model.safetensors"),
    "thirds": ("lora on thirds", "adapter_model.safetensors"),
    "adapter": ("houlsby and norms", "adapter.safetensors"),
    "embedding prefix": ("embedding prefix", "adapter_model.safetensors"),
    "key_value prefix": ("key_value prefix", "adapter_model.safetensors"),
    "modules beside a prefix": ("embedding prefix and norms", "adapter_model.safetensors"),
}


@pytest.fixture(params=DAMAGED.values(), ids=DAMAGED.keys())
def saved(request, base, tmp_path):
    """(directory, tensor file) of a good save, to be damaged."""
    name, file = request.param
    save_trained(perturb(modified(base, **SAVED[name])), tmp_path)
    load_trained(tmp_path)
    return tmp_path, tmp_path / file


def test_each_missing_tensor_is_noticed_and_named(saved):
    directory, file = saved
    tensors = load_file(file)
    for name in list(tensors)[::3] if len(tensors) > 12 else tensors:
        save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
        own_name = (
            name.removeprefix("base_model.model.")
            .removeprefix("base_model.")
            .removesuffix(".weight")
            .removesuffix(".bias")
            .replace("prompt_embeddings", "transformer.prefix.embedding")
        )
        if own_name == "lm_head":  # beside wte: PEFT may have trained that alone
            assert "base_model.model.transformer.wte.weight" in tensors
            continue
        with pytest.raises(ValueError, match=own_name.replace(".", r"\.")):
            load_trained(directory)


def test_a_head_missing_beside_its_embeddings_is_found_out_by_the_manifest(base, tmp_path):
    save_trained(perturb(modified(base, **SAVED["lora and embeddings"])), tmp_path)
    modify_llm.write_manifest(tmp_path)
    load_trained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        load_trained(tmp_path)


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_matrix_that_lacks_its_partner_in_what_peft_made_is_named(base, tmp_path, matrix):
    peft_made(base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    missing = [name for name in tensors if matrix in name]
    assert len(missing) == 2 * LAYERS
    for name in missing:
        save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
        own_name = name.removeprefix("base_model.model.").removesuffix(".weight")
        with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: lacks {own_name}')}$"):
            load_trained(tmp_path)


@pytest.mark.parametrize(
    "what", ["NaN", "infinite", "another shape", "transposed", "an extra tensor"]
)
def test_a_wrong_tensor_is_named(saved, what):
    directory, file = saved
    tensors = load_file(file)
    name = next(
        (n for n in tensors if tensors[n].ndim == 2 and tensors[n].shape[0] != tensors[n].shape[1]),
        None,
    )
    name = name or next(iter(tensors))
    match what:
        case "NaN":
            tensors[name].view(-1)[-1] = math.nan
        case "infinite":
            tensors[name].view(-1)[0] = -math.inf
        case "another shape":
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
        case "transposed":
            tensors[name] = (
                tensors[name].T if tensors[name].ndim == 2 else tensors[name][None]
            ).contiguous()
        case _:
            name = "base_model.model.transformer.h.0.mlp.c_surplus.weight"
            tensors[name] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    # A against B: the layer's name says enough
    own_name = name.removeprefix("base_model.model.").split(".lora_")[0]
    if what in ("another shape", "transposed"):
        own_name = own_name.replace("prompt_embeddings", "transformer.prefix.embedding")
    with pytest.raises(ValueError, match=own_name.replace(".", r"\.")):
        load_trained(directory)


@pytest.mark.parametrize("damage", ["cut short", "empty", "garbage", "gone"])
def test_a_damaged_file_is_named(saved, damage):
    directory, file = saved
    content = file.read_bytes()
    damaged = {"cut short": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 200}
    file.unlink()
    if damage in damaged:
        file.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"\S") as error:
        load_trained(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(
            (file, text)
            for file in ("modification.json", "adapter_config.json")
            for text in ("", "{", "[]", "[" * 100_000)
        ),
        ("modification.json", '{"modification_type": "other"}'),
        ("modification.json", '{"modification_type": "lora", "lora_rank": "four"}'),
        (
            "modification.json",
            '{"modification_type": "lora", "lora_rank": 4, "lora_dropout": 0, "lora_alpha": -1}',
        ),
    ],
    ids=lambda value: value[:60],
)
def test_damaged_settings_are_named(base, tmp_path, file, content):
    save_trained(perturb(modified(base)), tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        load_trained(tmp_path, base)


DAMAGED_SETTINGS = "its settings are damaged"


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        *(("modification.json", "lora_rank", v, "lora_rank") for v in ([1], {}, "x", None, 3.5)),
        *(
            ("modification.json", key, v, key)
            for key in ("lora_target_modules", "trainable_modules")
            for v in ([1], 5)
        ),
        ("adapter_config.json", "r", "x", "lora_rank"),
        *(
            ("adapter_config.json", "alpha_pattern", v, DAMAGED_SETTINGS)
            for v in ([1], "x", 5, {"(": 4})
        ),
    ],
)
def test_settings_of_another_type_are_refused_in_one_line_that_says_where(
    base, tmp_path, file, key, value, said
):
    save_trained(perturb(modified(base)), tmp_path)
    if file != "modification.json":  # as PEFT would have left it
        (tmp_path / "modification.json").unlink()
    settings = modify_llm.read_json(tmp_path / file)
    modify_llm.write_json(tmp_path / file, settings | {key: value})
    where = f"{tmp_path}: " if said == DAMAGED_SETTINGS else f"{tmp_path / file}: --"
    with pytest.raises(ValueError, match=f"^{re.escape(where + said)}") as error:
        load_trained(tmp_path, base)
    assert "\n" not in str(error.value)


def test_a_runs_directory_stands_for_its_best_or_else_its_final(base, tmp_path, tokenizer):
    models = {name: perturb(modified(base), seed=len(name)) for name in ("final", "best")}
    for name, model in models.items():
        save_trained(model, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert close(logits(load_trained(tmp_path, base)), logits(model))
        merge = ["--adapter_path", str(tmp_path), "--merge_to", str(tmp_path / f"merged {name}")]
        assert modify_llm.main([*merge, "--model_name_or_path", str(base)]) == 0
        merged = GPT2LMHeadModel.from_pretrained(tmp_path / f"merged {name}")
        assert close(logits(merged), logits(model))
        assert (tmp_path / f"merged {name}" / "tokenizer.json").exists()
    save_trained(models["final"], tmp_path)  # a result itself, whatever else is there
    assert close(logits(load_trained(tmp_path, base)), logits(models["final"]))


def test_a_directory_without_anything_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing that was trained"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    "settings", [TECHNIQUES[n] for n in ("lora", "houlsby", "embedding prefix", "key_value prefix")]
)
@pytest.mark.parametrize(
    ("key", "value"), [("n_layer", 2), ("n_embd", 64), ("vocab_size", 310), ("n_head", 8)]
)
def test_a_base_of_another_size_is_refused_by_what_differs(base, tmp_path, settings, key, value):
    save_trained(perturb(modified(base, **settings)), tmp_path / "trained")
    small(**{key: value}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        load_trained(tmp_path / "trained", str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["lora", "houlsby", "embedding prefix"])
def test_a_base_whose_weights_changed_is_refused_unless_it_was_asked_for_by_name(
    caplog, tmp_path, name
):
    small().save_pretrained(tmp_path / "base")
    model = perturb(modified(str(tmp_path / "base"), **TECHNIQUES[name]))
    save_trained(model, tmp_path / "final")
    small(seed=7).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base: not the weights"):
        load_trained(tmp_path / "final")
    assert not close(
        logits(load_trained(tmp_path / "final", str(tmp_path / "base"))), logits(model), 0.1
    )
    assert "not the weights" in caplog.text


def test_a_base_that_is_gone_is_named(tmp_path):
    small().save_pretrained(tmp_path / "base")
    save_trained(perturb(modified(str(tmp_path / "base"))), tmp_path / "runs" / "final")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=str(tmp_path / "base")):
        load_trained(tmp_path / "runs" / "final")


def test_a_base_given_by_name_is_looked_up_from_here_not_from_beside_the_result(
    tmp_path, monkeypatch
):
    for directory, seed in (("run/base", 0), ("base", 7)):
        small(seed=seed).save_pretrained(tmp_path / directory)
    save_trained(modified(str(tmp_path / "run" / "base")), tmp_path / "run" / "final")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert torch.equal(logits(load_trained("../run/final")), logits(plain("../run/base")))
    assert torch.equal(logits(load_trained("../run/final", "../base")), logits(plain("../base")))


def test_a_base_that_lies_beside_the_result_moves_with_it(tmp_path):
    small().save_pretrained(tmp_path / "run" / "base")
    model = perturb(modified(str(tmp_path / "run" / "base")))
    save_trained(model, tmp_path / "run" / "final")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert close(logits(load_trained(tmp_path / "moved" / "final")), logits(model), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["selective", "selective, head frozen", "full"])
def test_a_plain_model_is_saved_at_its_base_s_precision_with_frozen_weights_bit_for_bit(
    tmp_path, name, dtype
):
    small().to(dtype).save_pretrained(tmp_path / "base")
    model = perturb(modified(str(tmp_path / "base"), **TECHNIQUES[name]))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_trained(model, tmp_path / "final")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    trained = trainable_state(model)
    for key, tensor in after.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, trained[key].to(dtype) if key in trained else before[key]), key
    assert GPT2Config.from_pretrained(tmp_path / "final").dtype == dtype


@pytest.mark.parametrize("name", ["selective", "full"])
def test_a_plain_model_keeps_its_base_s_dropouts(tmp_path, name):
    small(attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.3).save_pretrained(tmp_path / "base")
    save_trained(modified(str(tmp_path / "base"), **TECHNIQUES[name]), tmp_path / "final")
    config = GPT2Config.from_pretrained(tmp_path / "final")
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.1, 0.2, 0.3)


# ---- merging from the command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, SAVED["lora on thirds"], SAVED["lora and all that is not wrapped"]],
    ids=["all layers", "thirds", "with embeddings and norms"],
)
def test_a_merged_directory_is_a_plain_gpt2_for_auto_classes_and_pipelines(
    base_dir, tokenizer, tmp_path, settings
):
    model = perturb(modified(str(base_dir), **settings))
    save_trained(model, tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    assert (
        main(["--adapter_path", str(tmp_path / "final"), "--merge_to", str(tmp_path / "merged")])
        == 0
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (
        type(merged) is GPT2LMHeadModel and merged.lm_head.weight is merged.transformer.wte.weight
    )
    assert close(logits(merged), logits(model), 1e-4) and not close(
        logits(merged), logits(plain(base_dir)), 1e-2
    )
    generate = pipeline("text-generation", model=str(tmp_path / "merged"), device="cpu")
    text = generate("Hello there", max_new_tokens=5, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    assert text == tokenizer.decode(generated(model, ids, max_new_tokens=5)[0, ids.shape[1] :])


@pytest.mark.parametrize(
    "config", [{}, {"modules_to_save": ["wte"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_lora_that_peft_made_merges_on_the_base_that_is_named(base, tmp_path, config):
    theirs = peft_made(base, tmp_path / "peft", **config)
    flags = ["--adapter_path", str(tmp_path / "peft"), "--merge_to", str(tmp_path / "merged")]
    assert main([*flags, "--model_name_or_path", base]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert close(logits(merged), logits(theirs), 1e-4)
    assert GPT2Config.from_pretrained(tmp_path / "merged").tie_word_embeddings == (not config)


def test_a_merged_directory_keeps_its_base_s_precision_and_dropouts(tmp_path):
    small(attn_pdrop=0.1, resid_pdrop=0.2).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = perturb(modified(str(tmp_path / "base")))
    save_trained(model, tmp_path / "final")
    main(["--adapter_path", str(tmp_path / "final"), "--merge_to", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16 and (
        merged.config.attn_pdrop,
        merged.config.resid_pdrop,
    ) == (0.1, 0.2)
    assert close(logits(merged.float()), logits(model), 0.05)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("houlsby", "adapter cannot be folded"),
        ("embedding prefix", "prefix cannot be folded"),
        ("key_value prefix", "prefix cannot be folded"),
        ("selective", "plain model already"),
        ("full", "plain model already"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(capsys, base, tmp_path, name, reason):
    save_trained(modified(base, **TECHNIQUES[name]), tmp_path / "final")
    message = refused(
        capsys, ["--adapter_path", str(tmp_path / "final"), "--merge_to", str(tmp_path / "merged")]
    )
    assert reason in message and str(tmp_path / "final") in message
    assert not (tmp_path / "merged").exists()


def test_merging_never_writes_over_anything(capsys, base, tmp_path):
    save_trained(modified(base), tmp_path / "final")
    before = {file.name: file.read_bytes() for file in (tmp_path / "final").iterdir()}
    flags = ["--adapter_path", str(tmp_path / "final"), "--merge_to"]
    assert "not an empty directory" in refused(capsys, [*flags, str(tmp_path / "final")])
    file = tmp_path / "file"
    file.write_text("mine")
    assert "not an empty directory" in refused(capsys, [*flags, str(file)])
    assert {file.name: file.read_bytes() for file in (tmp_path / "final").iterdir()} == before
    assert file.read_text() == "mine"


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--lora_target_modules q_proj",
            ["--lora_target_modules q_proj", "c_attn", "c_fc", "c_proj"],
        ),
        ("--lora_target_modules fc", ["--lora_target_modules fc", "matches nothing"]),
        ("--lora_target_modules c_fc,attn.c_fc", ["attn.c_fc", "matches nothing"]),
        ("--lora_target_modules c_fc,mlp.c_fc", ["mlp.c_fc", "another target"]),
        ("--lora_target_modules c_attn.q,c_attn", ["c_attn", "another target"]),
        ("--lora_target_modules c_attn,c_attn.v", ["c_attn.v", "another target"]),
        ("--lora_target_modules c_proj.q", ["c_proj.q", "matches nothing"]),
        ("--lora_target_modules wte", ["wte", "Embedding"]),
        ("--lora_target_modules ln_1", ["ln_1", "LayerNorm"]),
        ("--lora_target_modules attn", ["attn", "GPT2Attention"]),
        ("--lora_target_modules lm_head", ["lm_head", "shares its weight"]),
        ("--lora_target_modules ,", ["--lora_target_modules"]),
        ("--trainable_modules ln_9", ["--trainable_modules ln_9", "ln_1", "wte"]),
        ("--trainable_modules c_attn", ["--trainable_modules c_attn", "wrapped by LoRA"]),
        ("--modification_type selective --freeze_layers 12", ["--freeze_layers 12", "0 to 11"]),
        ("--modification_type selective --freeze_layers=-1", ["--freeze_layers", "'-1'"]),
        ("--modification_type selective --freeze_layers two", ["--freeze_layers", "'two'"]),
        ("--modification_type selective --freeze_layers 5-2", ["--freeze_layers", "'5-2'"]),
        (
            "--modification_type selective --freeze_layers 0-999999999",
            ["--freeze_layers", "999999999"],
        ),
        (
            "--modification_type selective --freeze_layers 0-11 --freeze_head",
            ["--freeze_layers", "--freeze_head"],
        ),
        ("--lora_rank 0", ["argument --lora_rank: '0': expected int >= 1"]),
        ("--dropout 1.5", ["argument --dropout: '1.5': expected float >= 0 and < 1"]),
        ("--dropout nan", ["argument --dropout: 'nan': expected float >= 0"]),
        ("--lora_alpha nan", ["argument --lora_alpha: 'nan': expected float"]),
        ("--lora_alpha inf", ["argument --lora_alpha: 'inf': expected float"]),
        ("--lora_rank four", ["--lora_rank", "'four'"]),
        (
            "--from_scratch --hidden_size 100 --num_attention_heads 3",
            ["--hidden_size 100", "3 heads"],
        ),
        ("--from_scratch --num_attention_heads 0", ["--num_attention_heads", "'0'"]),
        ("--from_scratch --vocab_size -5", ["--vocab_size", "'-5'"]),
        ("--from_scratch maybe", ["--from_scratch", "'maybe'"]),
        (
            "--modification_type prefix --prefix_length 1024",
            ["--prefix_length 1024", "1024 positions"],
        ),
        (
            "--modification_type prefix --prefix_projection_size 8",
            ["--prefix_projection_size", "key_value"],
        ),
        (
            "--modification_type prefix --prefix_projection_size=-8",
            ["--prefix_projection_size", "'-8'"],
        ),
        (
            "--modification_type qlora",
            ["--modification_type", "'qlora'", "lora", "adapter", "selective"],
        ),
        ("--adapter_placement both", ["--adapter_placement", "'both'", "pfeiffer", "houlsby"]),
        ("--lora_r 4", ["--lora_r"]),
        ("--plot compared.png", ["--plot", "--compare"]),
        ("--compare --adapter_path a --merge_to b", ["--compare", "--merge_to"]),
        ("--model_name_or_path=", ["--model_name_or_path"]),
        ("--merge_to merged", ["--adapter_path", "--merge_to"]),
        ("--adapter_path final", ["--adapter_path", "--merge_to"]),
        ("--adapter_path no/such/run --merge_to no/such/merged", ["no/such/run"]),
        (
            "--model_name_or_path no/such/directory/here",
            ["--model_name_or_path no/such/directory/here"],
        ),
    ],
)
def test_a_bad_flag_is_refused_in_one_line_that_names_it(
    capsys, tmp_path, monkeypatch, flags, said
):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, flags.split())
    assert [part for part in said if part not in message] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "config.json"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": "[]"}, "config.json"),
        ({"config.json": '{"model_type": "llama"}'}, "llama"),
    ],
    ids=["empty", "cut short", "a list", "another architecture"],
)
def test_a_directory_that_holds_no_gpt2_is_refused(capsys, tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    message = refused(capsys, ["--model_name_or_path", str(tmp_path)])
    assert said in message and str(tmp_path) in message
    with pytest.raises(ValueError, match=said):
        final_modify(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize(
    "damage", ["gone", "cut short", "missing", "another shape", "NaN", "infinite"]
)
@pytest.mark.parametrize(
    "load", [lambda path: final_modify(model_name_or_path=path), load_trained], ids=["base", "full"]
)
def test_weights_are_never_filled_in_quietly(caplog, base, tmp_path, load, damage):
    save_trained(modified(base, modification_type="full"), tmp_path)
    file, name = tmp_path / "model.safetensors", "transformer.h.1.ln_2.weight"
    tensors, content = load_file(file), file.read_bytes()
    match damage:
        case "gone":
            file.unlink()
        case "cut short":
            file.write_bytes(content[: len(content) // 2])
        case "missing":
            del tensors[name]
        case "another shape":
            tensors[name] = tensors[name][1:].clone()
        case _:
            tensors[name][3] = math.nan if damage == "NaN" else -math.inf
    if damage not in ("gone", "cut short"):
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--model_name_or_path {tmp_path}") as error:
        load(str(tmp_path))
    assert "\n" not in str(error.value) and "LOAD REPORT" not in caplog.text
    assert damage in ("gone", "cut short") or name in str(error.value)


def test_a_head_of_its_own_that_is_missing_is_not_filled_in_quietly(tmp_path):
    small(tie_word_embeddings=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: lacks lm_head\.weight"):
        final_modify(model_name_or_path=str(tmp_path))


def test_weights_that_the_configuration_leaves_no_place_for_are_refused(base, tmp_path):
    fewer = base_with(base, tmp_path / "fewer", n_layer=1)
    reason = r"model\.safetensors: transformer\.h\.1\.\S+ has no place in this model"
    message = f"^{re.escape(f'--model_name_or_path {fewer}')}: {reason}$"
    with pytest.raises(ValueError, match=message):
        modified(fewer)
    save_trained(modified(base), tmp_path / "final")
    with pytest.raises(ValueError, match=message):
        load_trained(tmp_path / "final", fewer)


@pytest.mark.parametrize("both", [True, False], ids=["beside the embeddings", "alone"])
def test_a_tied_head_that_the_file_holds_has_its_place(base, tmp_path, both):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    if not both:
        del tensors["transformer.wte.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    model = modified(str(tmp_path / "base"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(logits(model), logits(plain(base)))


def test_a_base_may_be_named_by_a_path_object(base):
    model = modify_llm.final_modify(model_name_or_path=Path(base))
    assert torch.equal(logits(model), logits(plain(base)))


@pytest.mark.parametrize("settings", [{}, {"modification_type": "selective", "freeze_layers": "0"}])
def test_what_is_trained_on_a_merged_model_is_saved_on_the_merged_weights(base, tmp_path, settings):
    merged = modify_llm.merge_lora(perturb(modified(base)))
    expected = logits(merged)
    model = modify_llm.modify(merged, modify_llm.with_defaults(**settings))
    save_trained(model, tmp_path / "tuned")
    if settings:  # a plain model: it holds the merged weights
        assert close(logits(load_trained(tmp_path / "tuned")), expected)
    else:  # an adapter: the old base is not what it was trained on
        with pytest.raises(ValueError, match="names no base model"):
            load_trained(tmp_path / "tuned")


def test_a_layer_in_the_file_that_is_no_target_is_named(base, tmp_path):
    save_trained(perturb(modified(base)), tmp_path)
    settings = modify_llm.read_json(tmp_path / "modification.json")
    settings["lora_target_modules"] = ["c_attn"]
    modify_llm.write_json(tmp_path / "modification.json", settings)
    with pytest.raises(ValueError, match=r"c_(fc|proj)\.lora_A has no place"):
        load_trained(tmp_path)


def test_a_base_that_is_no_name_is_refused(base, tmp_path):
    save_trained(perturb(modified(base)), tmp_path)
    settings = modify_llm.read_json(tmp_path / "modification.json")
    settings |= {"base_model_name_or_path": 5}
    modify_llm.write_json(tmp_path / "modification.json", settings)
    with pytest.raises(ValueError, match="--model_name_or_path 5: neither a local directory nor"):
        load_trained(tmp_path)


def test_the_layout_of_the_published_files_loads(base, tmp_path):
    """Names without `transformer.`, no head, and the causal masks that the files hold."""
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()
    }
    tensors |= {
        f"h.{i}.attn.bias": torch.ones(1, 1, POSITIONS, POSITIONS).tril() for i in range(LAYERS)
    }
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}
    save_file(tensors, file, metadata={"format": "pt"})
    model = modified(str(tmp_path / "base"), modification_type="selective", freeze_layers=[0])
    assert torch.equal(logits(model), logits(plain(base)))
    save_trained(perturb(model), tmp_path / "final")
    assert close(logits(load_trained(tmp_path / "final")), logits(model), 1e-6)


def test_a_hub_that_never_answers_is_given_up_within_seconds(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        constants, template = (
            huggingface_hub.constants,
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        start = time.monotonic()
        message = refused(capsys, ["--model_name_or_path", "nobody/no-such-gpt2"])
    assert time.monotonic() - start < 15
    assert (
        "nobody/no-such-gpt2" in message and "timed out" in message and "local directory" in message
    )


# ---- models as people have them ------------------------------------------------------------------


def as_shards(directory, suffix):
    """Splits a model's tensors over two files with an index, in either format."""
    tensors, name = load_file(directory / "model.safetensors"), "model.safetensors"
    (directory / name).unlink()
    names, weight_map = sorted(tensors), {}
    if suffix == "bin":
        name = "pytorch_model.bin"
    stem = name.removesuffix(f".{suffix}")
    for i in range(2):
        part, file = {n: tensors[n] for n in names[i::2]}, f"{stem}-{i + 1:05}-of-00002.{suffix}"
        torch.save(part, directory / file) if suffix == "bin" else save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    modify_llm.write_json(directory / f"{name}.index.json", {"weight_map": weight_map})


def as_bin(directory, content=None, **saving):
    """Replaces a model's safetensors by pytorch_model.bin."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors if content is None else content, directory / "pytorch_model.bin", **saving)


@pytest.mark.parametrize(
    "change",
    [
        as_bin,
        lambda directory: as_bin(directory, _use_new_zipfile_serialization=False),
        lambda directory: as_shards(directory, "bin"),
        lambda directory: as_shards(directory, "safetensors"),
        # model.safetensors comes first
        lambda directory: torch.save({}, directory / "pytorch_model.bin"),
    ],
    ids=["bin", "old bin", "bin shards", "safetensors shards", "both"],
)
@pytest.mark.parametrize("technique", ["lora", "full"])
def test_weights_load_from_every_layout_and_what_is_trained_saves_on_them(
    base, tmp_path, change, technique
):
    directory = tmp_path / "base"
    shutil.copytree(base, directory)
    change(directory)
    model = modified(str(directory), modification_type=technique)
    assert torch.equal(logits(model), logits(plain(base)))
    save_trained(perturb(model), tmp_path / "final")
    assert close(logits(load_trained(tmp_path / "final")), logits(model), 1e-6)


def test_a_shard_that_is_missing_is_named(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    as_shards(tmp_path / "base", "safetensors")
    (tmp_path / "base" / "model-00002-of-00002.safetensors").unlink()
    message = "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json"
    with pytest.raises(ValueError, match=f"^--model_name_or_path {tmp_path}/base: {message}"):
        modified(str(tmp_path / "base"))


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def as_float8(directory):
    tensors = load_file(directory / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, directory / "model.safetensors")


def as_gptq(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.qweight"] = torch.ones(4, 4, dtype=torch.int32)
    save_file(tensors, directory / "model.safetensors")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda directory: (directory / "model.safetensors").write_text(LFS),
            r"model\.safetensors: .*git lfs pull",
        ),
        (
            lambda directory: as_bin(directory) or (directory / "pytorch_model.bin").write_text(LFS),
            r"pytorch_model\.bin: .*git lfs pull",
        ),
        (
            lambda directory: as_bin(directory, small()),
            r"pytorch_model\.bin: .*objects.*give model\.safetensors",
        ),
        (
            lambda directory: as_bin(directory, {"a": Payload()}),
            r"pytorch_model\.bin: .*objects.*give model\.safetensors",
        ),
        (
            lambda directory: as_bin(directory, {"epoch": 3, "model": small().state_dict()}),
            r"pytorch_model\.bin: holds something else than tensors by name",
        ),
        (lambda directory: as_bin(directory, [torch.ones(3)]), r"pytorch_model\.bin: \S"),
        (as_float8, r"model\.safetensors: transformer\.h\.0\.mlp\.c_fc\.weight .*quantised"),
        (as_gptq, r"model\.safetensors: \S*c_fc\.qweight has no place"),
        (
            lambda directory: (directory / "model.safetensors").rename(directory / "weights.pth"),
            r"holds neither model\.safetensors nor pytorch_model\.bin",
        ),
    ],
    ids=[
        "LFS pointer", "LFS pointer for a bin", "pickled model", "code", "a whole checkpoint",
        "a list", "float8", "GPTQ", "another name",
    ],
)  # fmt: skip
def test_a_file_that_holds_no_usable_weights_is_told_for_what_it_is(
    base, tmp_path, monkeypatch, change, said
):
    shutil.copytree(base, tmp_path / "base")
    change(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    where = re.escape(f"--model_name_or_path {tmp_path / 'base'}: ")
    with pytest.raises(ValueError, match=f"^{where}{said}") as error:
        modified(str(tmp_path / "base"))
    assert "\n" not in str(error.value) and not Path("unpickled").exists()


@pytest.mark.parametrize("load", ["base", "count"])
def test_a_quantised_configuration_is_refused(capsys, base, tmp_path, load):
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    directory = base_with(base, tmp_path / "base", **quantised)
    with pytest.raises(ValueError, match=r"config\.json: quantised weights; give"):
        modified(directory) if load == "base" else modify_llm.read_config(
            modify_llm.with_defaults(model_name_or_path=directory)
        )


def test_a_configuration_without_model_type_is_a_gpt2_s_if_its_keys_are(base, tmp_path):
    directory = Path(base_with(base, tmp_path / "base"))
    config = modify_llm.read_json(directory / "config.json")
    del config["model_type"]
    modify_llm.write_json(directory / "config.json", config)
    assert torch.equal(logits(modified(str(directory))), logits(plain(base)))
    del config["n_head"]
    modify_llm.write_json(directory / "config.json", config)
    with pytest.raises(ValueError, match="a None model; only GPT-2"):
        modified(str(directory))


def test_a_head_that_differs_from_the_embeddings_stays_apart_whatever_the_configuration_says(
    tmp_path,
):
    untied = small(tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "base")
    config = modify_llm.read_json(tmp_path / "base" / "config.json")
    modify_llm.write_json(tmp_path / "base" / "config.json", config | {"tie_word_embeddings": True})
    model = modified(str(tmp_path / "base"), modification_type="full")
    assert torch.equal(logits(model), logits(untied))
    save_trained(perturb(model), tmp_path / "final")
    assert close(logits(plain(tmp_path / "final")), logits(model), 1e-6)


@pytest.mark.parametrize("with_peft", [True, False], ids=["peft installed", "no peft"])
@pytest.mark.parametrize("technique", ["lora", "full"])
def test_an_adapter_beside_the_base_is_not_loaded_with_it(
    base, tmp_path, monkeypatch, technique, with_peft
):
    shutil.copytree(base, tmp_path / "base")
    peft_made(base, tmp_path / "base")
    if not with_peft:
        monkeypatch.setitem(sys.modules, "peft", None)
    model = modified(str(tmp_path / "base"), modification_type=technique)
    assert torch.equal(logits(model), logits(plain(base)))
    save_trained(perturb(model), tmp_path / "final")
    assert close(logits(load_trained(tmp_path / "final")), logits(model), 1e-6)


def test_what_a_base_says_about_generating_does_not_reach_the_model(base, tmp_path):
    """In generation_config.json and, as older models have it, in config.json itself."""
    wishes = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "use_cache": False}
    wishes |= {"repetition_penalty": 5.0, "max_length": 7, "output_hidden_states": True}
    wishes |= {"attn_implementation": "flash_attention_2", "torchscript": True}
    wishes |= {"task_specific_params": {"text-generation": {"do_sample": True}}, "auto_map": {}}
    directory = base_with(base, tmp_path / "base", **wishes, return_dict=False)
    modify_llm.write_json(tmp_path / "base" / "generation_config.json", wishes)
    model, untouched = modified(directory), modified(base)
    assert model.generation_config == untouched.generation_config
    assert model.config.to_diff_dict() == untouched.config.to_diff_dict()
    assert model(input_ids=token_ids()).hidden_states is None


@pytest.mark.parametrize("technique", ["lora", "full", "selective"])
def test_what_is_saved_or_merged_names_the_token_that_ends_a_text(base, tmp_path, technique):
    settings = {"freeze_layers": "0"} if technique == "selective" else {}
    model = modified(base, modification_type=technique, **settings)
    modify_llm.set_end_token(model, 7, pad_token_id=9)
    assert model.config.pad_token_id is None  # else transformers looks for padding in each batch
    save_trained(perturb(model), tmp_path / "first")
    save_trained(load_trained(tmp_path / "first"), tmp_path / "final")
    result = tmp_path / "final"
    if technique == "lora":
        result = tmp_path / "merged"
        main(["--adapter_path", str(tmp_path / "final"), "--merge_to", str(result)])
    stored = AutoModelForCausalLM.from_pretrained(result)
    for config in (stored.config, stored.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (7, 9)
    generated_ids = stored.generate(token_ids(1), max_new_tokens=40, do_sample=False)
    assert stored.generation_config.num_beams in (None, 1) and len(generated_ids) == 1
    modify_llm.set_end_token(model, 5)
    save_trained(model, tmp_path / "again")
    settings = modify_llm.read_json(tmp_path / "again" / "modification.json")
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (5, 5)


@pytest.mark.parametrize("own", [True, False], ids=["the adapter's", "the base's"])
def test_a_merged_directory_has_the_adapter_s_tokenizer_or_else_the_base_s(base, tmp_path, own):
    files = {"tokenizer.json": "{}", "spiece.model": "x", "added_tokens.json": "{}"}
    shutil.copytree(base, tmp_path / "base")
    for name, content in files.items():
        (tmp_path / "base" / name).write_text(content)
    peft_made(tmp_path / "base", tmp_path / "peft")
    (tmp_path / "peft" / "tokenizer_config.json").write_text("{}")  # that alone is no tokenizer
    if own:
        (tmp_path / "peft" / "vocab.json").write_text("{}")
    merged = tmp_path / "merged"
    main(["--adapter_path", str(tmp_path / "peft"), "--merge_to", str(merged)])
    copied = {file.name for file in merged.iterdir()}
    copied -= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert copied == ({"vocab.json", "tokenizer_config.json"} if own else set(files))


@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], ["c_attn.q", "c_attn.v"]])
def test_lora_with_dropout_trains_on_a_bf16_model_without_autocast(base, targets):
    exact = perturb(apply_lora(plain(base), target_modules=targets), 0.02)
    model = apply_lora(plain(base).bfloat16(), target_modules=targets, dropout=0.5)
    model.load_state_dict(trainable_state(exact), strict=False)
    assert logits(model).dtype == torch.bfloat16 and close(logits(model), logits(exact), 0.05)
    loss = model.train()(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_the_weight_of_a_wrapped_layer_is_the_one_it_multiplies_by():
    model = perturb(apply_lora(small(tie_word_embeddings=False), target_modules=["lm_head"]))
    head, x = model.lm_head, torch.randn(5, HIDDEN)
    assert close(x @ head.weight.T, head(x), 1e-5)
    gradients = [torch.autograd.grad(h.sum(), head.lora_B) for h in (x @ head.weight.T, head(x))]
    assert close(gradients[0][0], gradients[1][0], 1e-5)
    before = head.weight.detach().clone()
    head.merge()
    assert close(head.weight, before, 1e-6)
    head = apply_lora(small(tie_word_embeddings=False), dropout=0.1, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"--lora_dropout 0\.1: acts on a layer's input"):
        head.train().lm_head.weight  # noqa: B018


RESIZED = {
    "frozen": {},
    "embeddings trained": {"modules_to_save": ["wte"]},
    "both trained": {"modules_to_save": ["wte", "lm_head"]},
}


@pytest.mark.parametrize("config", RESIZED.values(), ids=RESIZED.keys())
def test_what_peft_made_after_resizing_the_embeddings_loads_on_the_resized_base(
    base, tmp_path, config
):
    resized = plain(base)
    resized.resize_token_embeddings(VOCAB + 7)
    resized.save_pretrained(tmp_path / "resized")
    resized.config._name_or_path = base  # PEFT compares with the base's size, and saves both
    theirs = peft.get_peft_model(
        resized,
        peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, target_modules=["c_attn"], **config),
    )  # fmt: skip
    perturb(theirs).save_pretrained(tmp_path / "peft")
    assert "base_model.model.transformer.wte.weight" in load_file(
        tmp_path / "peft" / "adapter_model.safetensors"
    )
    ours = load_trained(tmp_path / "peft", str(tmp_path / "resized"))
    assert close(logits(ours), logits(theirs), 1e-5)
    assert len(trainable_state(ours)) == len(trainable_state(theirs))
    rows = f"embeddings of {VOCAB + 7} rows, the base has {VOCAB}; give --model_name_or_path"
    with pytest.raises(ValueError, match=rows):
        load_trained(tmp_path / "peft", base)


def test_an_adapter_in_a_bin_file_loads_and_one_without_lora_is_named(base, tmp_path):
    theirs = peft_made(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert close(logits(load_trained(tmp_path)), logits(theirs), 1e-5)
    torch.save({"base_model.model.transformer.ln_f.bias": torch.zeros(HIDDEN)},
               tmp_path / "adapter_model.bin")  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'adapter_model.bin'}: holds no")):
        load_trained(tmp_path)
    (tmp_path / "adapter_model.bin").write_text(LFS)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: a git-LFS pointer"):
        load_trained(tmp_path)


def test_a_base_with_cross_attention_takes_lora_and_refuses_a_prefix_and_thirds(tmp_path):
    small(add_cross_attention=True).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="--modification_type prefix: the base has cross-attention"
    ):
        modified(str(tmp_path), modification_type="prefix")
    with pytest.raises(ValueError, match=r"--lora_target_modules c_attn\.q: \S*crossattention"):
        modified(str(tmp_path), lora_target_modules="c_attn.q")
    model = perturb(modified(str(tmp_path)))
    save_trained(model, tmp_path / "final")
    assert close(logits(load_trained(tmp_path / "final")), logits(model), 1e-6)


@pytest.mark.parametrize(
    "apply",
    [
        apply_lora,
        apply_adapters,
        lambda model, **extra: apply_prefix(model, LENGTH, **extra),
        lambda model, **extra: apply_selective_freezing(model, [0], **extra),
    ],
    ids=["lora", "adapter", "prefix", "selective"],
)
@pytest.mark.parametrize("wrong", ["ln_9", "gelu", "dropout"])
def test_a_trainable_module_that_is_not_there_leaves_the_model_as_it_was(apply, wrong):
    model = small()
    with pytest.raises(ValueError, match=f"--trainable_modules {wrong}: matches nothing"):
        apply(model, trainable_modules=["ln_f", wrong])
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in small().modules()]
    apply(model)


def test_settings_may_be_texts_as_the_flags_are():
    lora = apply_lora(small(), rank="3", alpha="6", target_modules="c_fc", trainable_modules="ln_f")
    assert parameter_counts(lora)[1] == LAYERS * 3 * 5 * HIDDEN + 2 * HIDDEN
    adapters = apply_adapters(small(), adapter_size="8")
    assert parameter_counts(adapters) == parameter_counts(apply_adapters(small(), 8))
    assert parameter_counts(apply_prefix(small(), prefix_length="4"))[1] == 4 * HIDDEN
    assert trained_modules(apply_selective_freezing(small(), "0-1")) == {"h.2", "wte", "ln_f"}


@both_prefixes
def test_a_prefixed_transformer_takes_every_argument_by_position(prefix_type):
    body, ids = prefixed(prefix_type).transformer, token_ids()
    positions = torch.arange(9).flip(0)[None]
    by_name = body(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    by_position = body(ids, None, torch.ones_like(ids), None, positions)
    assert torch.equal(by_name.last_hidden_state, by_position.last_hidden_state)
    assert not torch.equal(body(ids).last_hidden_state, by_name.last_hidden_state)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("--hidden_size 2000000000 --num_attention_heads 1 --num_hidden_layers 1", "its settings"),
        ("--num_hidden_layers 2000000000", "--num_hidden_layers"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused_by_their_flag(capsys, sizes, said):
    message = refused(capsys, ["--from_scratch", *sizes.split()])
    assert said in message and ("--from_scratch" in message or "argument" in message)
    assert "model_name_or_path" not in message


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch, base):
    """A hub on loopback that serves tmp_path/hub, and an empty cache.

    It holds someone/tiny (the base with a tokenizer's file, and an adapter beside it) and
    someone/tiny-bin (pytorch_model.bin alone).
    """
    root = tmp_path / "hub"
    for name in ("tiny", "tiny-bin"):
        shutil.copytree(base, root / "someone" / name)
        (root / "someone" / name / "tokenizer.json").write_text("{}")
    as_bin(root / "someone" / "tiny-bin")
    (root / "someone" / "tiny" / "adapter_config.json").write_text("{}")

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", headers=()):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[0] == "api":
                directory = root / "/".join(parts[2:4])
                if not directory.is_dir():
                    return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
                files = [file for file in directory.iterdir() if file.is_file()]
                if "tree" in parts:
                    content = [
                        {"type": "file", "oid": "b" * 40, "size": f.stat().st_size, "path": f.name}
                        for f in files
                    ]
                else:
                    siblings = [{"rfilename": file.name} for file in files]
                    content = {"id": "/".join(parts[2:4]), "sha": "a" * 40, "siblings": siblings}
                return self.reply(
                    200, json.dumps(content).encode(), {"Content-Type": "application/json"}
                )
            file = root / parts[0] / parts[1] / parts[-1]
            if not file.is_file():
                return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
            return self.reply(200, content, etag)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield root
    server.shutdown()
    server.server_close()


def unreachable(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["someone/tiny", "someone/tiny-bin"])
def test_a_model_comes_from_the_hub_once_with_its_tokenizer_and_nothing_else(
    hub, base, monkeypatch, name
):
    assert torch.equal(logits(modified(name)), logits(plain(base)))
    unreachable(monkeypatch)
    assert torch.equal(logits(modified(name)), logits(plain(base)))
    files = {file.name for file in Path(modify_llm.locate(name)).iterdir()}
    weights = "pytorch_model.bin" if name.endswith("bin") else "model.safetensors"
    assert files == {"config.json", "tokenizer.json", weights}


@pytest.mark.parametrize("cached", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_repository_of_which_the_cache_holds_a_part_is_completed_or_refused(
    hub, base, monkeypatch, caplog, cached
):
    huggingface_hub.hf_hub_download("someone/tiny", cached, cache_dir=hub.parent / "cache")
    with monkeypatch.context() as offline:
        unreachable(offline)
        with pytest.raises(
            ValueError, match=r"^--model_name_or_path someone/tiny: holds n"
        ) as error:
            modified("someone/tiny")
        assert "\n" not in str(error.value) and "only what the cache holds" in caplog.text
    assert torch.equal(logits(modified("someone/tiny")), logits(plain(base)))


def test_a_cached_model_whose_vocabulary_is_not_cached_asks_the_hub_and_goes_on_without_it(
    hub, base, monkeypatch
):
    for file in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("someone/tiny", file, cache_dir=hub.parent / "cache")
    with monkeypatch.context() as offline:
        unreachable(offline)
        assert torch.equal(logits(modified("someone/tiny")), logits(plain(base)))
    assert (Path(modify_llm.locate("someone/tiny")) / "tokenizer.json").exists()


def test_a_repository_that_is_not_on_the_hub_is_refused(hub):
    with pytest.raises(ValueError, match="someone/absent: neither a local directory nor"):
        modified("someone/absent")


def test_a_repository_or_directory_that_holds_an_adapter_alone_is_told_for_what_it_is(
    hub, base, tmp_path
):
    peft_made(base, tmp_path / "peft")
    with pytest.raises(
        ValueError, match=r"holds no config\.json; it is an adapter, .*--adapter_path"
    ):
        modified(str(tmp_path / "peft"))
    shutil.copytree(tmp_path / "peft", hub / "someone" / "adapter")
    with pytest.raises(ValueError, match=r"someone/adapter: holds no config\.json"):
        modified("someone/adapter")
