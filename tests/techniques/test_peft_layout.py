"""PEFT loads what was saved, with equal logits, and what PEFT made loads here, or one line says what is
not supported; PEFT itself is never imported.

    python -m pytest tests/techniques/test_peft_layout.py
"""

import ast
import copy
import json
import re
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    HIDDEN,
    LAYERS,
    LFS,
    SAVED,
    VOCAB,
    base_with,
    close,
    logits,
    modified,
    peft_made,
    perturb,
    plain,
    small,
    token_ids,
)

import modify_llm
from modify_llm import apply_lora, load_trained, merge_lora, save_trained, trainable_state


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
    assert packages <= {
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "pandas",
        "regex",
    }


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
    settings |= {"base_model_name_or_path": "gone/away", "base_relative_path": "../gone"}
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
    rows = rf"has shape \({VOCAB + 7}, \d+\), the model's \({VOCAB}, \d+\)"
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
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*names no layer"):
        load_trained(tmp_path)
    (tmp_path / "adapter_model.bin").write_text(LFS)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: a git-LFS pointer"):
        load_trained(tmp_path)
