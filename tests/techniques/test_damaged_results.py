"""A missing or wrong tensor, a damaged file and settings that make no sense are noticed and named.

python -m pytest tests/techniques/test_damaged_results.py
"""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SAVED, modified, perturb

import modify_llm
from modify_llm import load_trained, save_trained

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
        *(("modification.json", "lora_rank", v, "lora_rank") for v in ([1, 2], {}, "x", None, 3.5)),
        *(
            ("modification.json", key, v, key)
            for key in ("lora_target_modules", "trainable_modules")
            for v in (["no_such"], 5)
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
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*{said}") as error:
        load_trained(tmp_path, base)
    assert "\n" not in str(error.value)


def test_a_layer_in_the_file_that_is_no_target_is_named(base, tmp_path):
    save_trained(perturb(modified(base)), tmp_path)
    settings = modify_llm.read_json(tmp_path / "modification.json")
    settings["lora_target_modules"] = ["c_attn"]
    modify_llm.write_json(tmp_path / "modification.json", settings)
    with pytest.raises(ValueError, match=r"c_(fc|proj)\.lora_A has no place"):
        load_trained(tmp_path)
