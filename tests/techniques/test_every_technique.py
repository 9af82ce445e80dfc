"""What holds for every technique: one at a time, modules trained besides it, precision, gradient
checkpointing, transformers' Trainer, the defaults, and final_modify.

    python -m pytest tests/techniques/test_every_technique.py
"""

import argparse
import copy
import dataclasses
import math
import re

import pytest
import torch
from small_models import (
    HIDDEN,
    LAYERS,
    LENGTH,
    POSITIONS,
    PREFIXES,
    TECHNIQUES,
    VOCAB,
    close,
    every_technique,
    generated,
    logits,
    modified,
    perturb,
    plain,
    refused,
    small,
    token_ids,
    trained_modules,
)
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import modify_llm
from modify_llm import (
    apply_adapters,
    apply_full_finetuning,
    apply_lora,
    apply_prefix,
    apply_selective_freezing,
    final_modify,
    merge_lora,
    parameter_counts,
    trainable_state,
)

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
    with pytest.raises(ValueError, match=r"c_attn is a LoRALayer"):
        apply_lora(model)
    assert torch.equal(logits(model), expected) and set(trainable_state(model)) == trained
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert close(logits(merge_lora(model)), expected, 1e-4)


@pytest.mark.parametrize(
    ("apply", "wrong", "message"),
    [
        (apply_lora, {"rank": 0}, "--lora_rank: invalid int >= 1 and < 1000000000 value: '0'"),
        (apply_lora, {"rank": 2.5}, "--lora_rank: invalid int >= 1 and < 1000000000 value: '2.5'"),
        (apply_lora, {"alpha": 0}, "--lora_alpha: invalid float >= "),
        (apply_lora, {"dropout": 1.0}, "--lora_dropout: invalid float >= 0 and < 1 value: '1.0'"),
        (apply_adapters, {"adapter_size": 0}, "--adapter_size: invalid int >= 1"),
        (
            apply_adapters,
            {"placement": "other"},
            "--adapter_placement: invalid choice: 'other' (choose from",
        ),
        (
            apply_prefix,
            {"prefix_length": POSITIONS},
            f"--prefix_length {POSITIONS}: leaves no room",
        ),
        (
            apply_prefix,
            {"prefix_type": "other"},
            "--prefix_type: invalid choice: 'other' (choose from",
        ),
        (apply_prefix, {"projection_size": 8}, "--prefix_projection_size 8: needs --prefix_type"),
        (
            apply_prefix,
            {"projection_size": -8, "prefix_type": "key_value"},
            "--prefix_projection_size: invalid int >= 0",
        ),
        (apply_selective_freezing, {"freeze_layers": [LAYERS]}, "--freeze_layers 3: the model has"),
    ],
)
def test_the_functions_check_their_arguments_by_the_flags_and_leave_the_model_as_it_was(
    apply, wrong, message
):
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
    said = "--lora_rank: invalid int >= 1 and < 1000000000 value: '0'"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        final_modify(lora_rank=0)
    message = refused(capsys, ["--lora_rank", "0", "--adapter_size", "-1"])
    assert message == f"argument {said}"


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


def test_lists_may_be_texts_as_the_flags_are():
    lora = apply_lora(small(), rank=3, alpha=6, target_modules="c_fc", trainable_modules="ln_f")
    assert parameter_counts(lora)[1] == LAYERS * 3 * 5 * HIDDEN + 2 * HIDDEN
    adapters = apply_adapters(small(), adapter_size=8)
    assert parameter_counts(adapters) == parameter_counts(apply_adapters(small(), 8))
    assert parameter_counts(apply_prefix(small(), prefix_length=4))[1] == 4 * HIDDEN
    assert trained_modules(apply_selective_freezing(small(), "0-1")) == {"h.2", "wte", "ln_f"}
