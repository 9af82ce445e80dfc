"""What was saved loads with equal logits and trains on, on its own base and wherever it is moved to.

python -m pytest tests/techniques/test_saving_and_loading.py
"""

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_models import LENGTH, SAVED, TECHNIQUES, close, logits, modified, perturb, plain, small
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import modify_llm
from modify_llm import (
    apply_adapters,
    apply_full_finetuning,
    apply_lora,
    apply_prefix,
    apply_selective_freezing,
    load_trained,
    merge_lora,
    parameter_counts,
    save_trained,
    trainable_state,
)

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
def test_a_model_of_one_s_own_is_saved_with_its_base_s_name(base, apply, tmp_path):
    model = perturb(apply(plain(base)))
    save_trained(model, tmp_path / "named")
    assert close(logits(load_trained(tmp_path / "named")), logits(model), 1e-6)
    model = perturb(apply(small()))
    save_trained(model, tmp_path / "of no name")
    small().save_pretrained(tmp_path / "base")
    loaded = load_trained(tmp_path / "of no name", tmp_path / "base")
    assert close(logits(loaded), logits(model), 1e-6)
    if not (tmp_path / "of no name" / "config.json").exists():
        with pytest.raises(ValueError, match="base model; give --model_name_or_path"):
            load_trained(tmp_path / "of no name")


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
    with pytest.raises(ValueError, match=f"'{key}': {value}.* was trained on"):
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
