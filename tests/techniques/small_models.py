"""A small GPT-2, every technique on it, and what is compared: logits up to rounding, refusals to the letter."""

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_gpt2
from transformers import GPT2LMHeadModel

import modify_llm
from modify_llm import final_modify, main, trainable_state

HIDDEN, LAYERS, VOCAB, POSITIONS, LENGTH = 32, 3, 300, 64, 6


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


def base_with(base, directory, **changes):
    """A copy of the base, with other values in its config.json."""
    shutil.copytree(base, directory)
    config = modify_llm.read_json(directory / "config.json")
    modify_llm.write_json(directory / "config.json", config | changes)
    return str(directory)


def our_name(name):
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


PREFIXES = {name: settings for name, settings in TECHNIQUES.items() if "prefix" in name}


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


def trained_modules(model):
    """Which blocks and which modules outside them hold trainable parameters."""
    names = {name.removeprefix("transformer.") for name in trainable_state(model)}
    return {
        ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]
        for name in names
    }


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


def peft_made(base, directory, **config):
    """A LoRA directory that PEFT itself trained (here: perturbed) and wrote."""
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "mlp.c_proj"], **config}
    config = {name: value for name, value in config.items() if value is not None}
    model = peft.get_peft_model(
        plain(base), peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **config)
    )
    perturb(model).save_pretrained(directory)
    return model


def as_bin(directory, content=None, **saving):
    """Replaces a model's safetensors by pytorch_model.bin."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors if content is None else content, directory / "pytorch_model.bin", **saving)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
