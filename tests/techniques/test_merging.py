"""A merged directory is a plain GPT-2 for transformers, and what cannot be folded is refused with the
reason.

    python -m pytest tests/techniques/test_merging.py
"""

import shutil

import pytest
import torch
from small_models import (
    SAVED,
    TECHNIQUES,
    close,
    generated,
    logits,
    modified,
    peft_made,
    perturb,
    plain,
    refused,
    small,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, pipeline

import modify_llm
from modify_llm import load_trained, main, save_trained


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
    copied -= {"modification.json"}
    assert copied == ({"vocab.json", "tokenizer_config.json"} if own else set(files))
