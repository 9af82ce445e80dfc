"""A base loads from every layout that people have, with every weight accounted for, or one line says
what is wrong with it.

    python -m pytest tests/techniques/test_base_models.py
"""

import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    LAYERS,
    LFS,
    POSITIONS,
    as_bin,
    base_with,
    close,
    logits,
    modified,
    peft_made,
    perturb,
    plain,
    refused,
    small,
    token_ids,
)
from transformers import AutoModelForCausalLM

import modify_llm
from modify_llm import final_modify, load_trained, main, save_trained


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
    with pytest.raises(ValueError, match=r"do not fit config\.json: missing_keys lm_head\.weight"):
        final_modify(model_name_or_path=str(tmp_path))


def test_weights_that_the_configuration_leaves_no_place_for_are_refused(base, tmp_path):
    fewer = base_with(base, tmp_path / "fewer", n_layer=1)
    reason = r"its weights do not fit config\.json: unexpected_keys transformer\.h\.1\.\S+"
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


def test_a_base_that_is_no_name_is_refused(base, tmp_path):
    save_trained(perturb(modified(base)), tmp_path)
    settings = modify_llm.read_json(tmp_path / "modification.json")
    settings |= {"base_model_name_or_path": 5, "base_relative_path": None}
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
    message = "model-00002-of-00002.safetensors: .*No such file"
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
        (as_gptq, r"model\.safetensors: \S*c_fc\.qweight .*quantised"),
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
