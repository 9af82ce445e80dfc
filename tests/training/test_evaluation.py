"""The held-out loss is the plain loss row by row, without dropout, and that of transformers on what was
saved.

    python -m pytest tests/training/test_evaluation.py
"""

import json
import multiprocessing
import random
import re

import pytest
import torch
from runs import (
    CPU,
    FORMAT,
    TECHNIQUES,
    first_gradients,
    held_out_losses,
    logged_rates,
    metrics,
    plain_loss,
    refused,
    run,
    small_gpt2,
    technique_model,
)

import data_pipeline
import modify_llm
import train_llm
from train_llm import SummedLoss, evaluate


def plain_right(model, dataset):
    """The number of labelled tokens that are the likeliest by transformers' own logits."""
    right = 0
    with torch.no_grad():
        for row in dataset:
            likeliest, labels = model(row["input_ids"][None]).logits[0].argmax(-1), row["labels"]
            right += int((likeliest[:-1] == labels[1:]).sum())
    return right


def test_evaluation_is_the_plain_loss_row_by_row_whatever_the_batch_size_and_padding(
    rows, bytes_tokenizer
):
    model = technique_model("lora")
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    expected, tokens = plain_loss(model, dataset)
    right = plain_right(model, dataset)
    for batch_size, padding, grouped in (
        (1, "longest", False),
        (7, "longest", True),
        (26, "max_length", False),
    ):
        loader = data_pipeline.final_dataset_loader(
            dataset, tokenizer=bytes_tokenizer, batch_size=batch_size, padding=padding, group_by_length=grouped,
            max_length=96, num_workers=0, shuffle=False,
        )  # fmt: skip
        loss, count, accuracy = evaluate(SummedLoss(model), loader, CPU)
        assert (count, accuracy) == (tokens, pytest.approx(right / tokens))
        assert loss == pytest.approx(expected, abs=1e-5)


def test_evaluation_in_bf16_takes_the_logits_in_fp32(rows, bytes_tokenizer):
    """Logits around -100, as real GPT-2's are, lie 0.5 apart in bf16: that would shift the loss."""
    model = small_gpt2()
    with torch.no_grad():  # a common offset of all logits, which the softmax does not see
        model.lm_head.weight += 3.0
        model.transformer.ln_f.bias -= 1.0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    expected, _ = plain_loss(model, dataset)
    loader = data_pipeline.final_dataset_loader(
        dataset, tokenizer=bytes_tokenizer, num_workers=0, max_length=96, shuffle=False
    )
    bf16 = train_llm.Runtime(torch.device("cpu"), torch.bfloat16)
    loss, _, _ = evaluate(SummedLoss(model), loader, bf16)
    assert loss == pytest.approx(expected, abs=2e-3)


def test_evaluation_is_without_dropout_and_leaves_the_mode_as_it_was(rows, bytes_tokenizer):
    model = small_gpt2(resid_pdrop=0.5)
    kinds = {
        "text_format": FORMAT,
        "max_length": 96,
        "num_workers": 0,
        "tokenizer": bytes_tokenizer,
    }
    loader = data_pipeline.final_dataset_loader(rows, shuffle=False, **kinds)
    loss = SummedLoss(model).train()
    values = {evaluate(loss, loader, CPU) for _ in range(2)}
    assert len(values) == 1
    assert loss.training and model.training


def printed_loss(capsys):
    return re.findall(
        r"^Held-out loss: (\d+\.\d{4}) \| Held-out PPL: [\d.]+ \|", capsys.readouterr().out, re.M
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_best_alone_brings_its_own_settings_and_evaluates_to_the_best_loss_of_its_run(
    technique_runs, flags, tmp_path, capsys, technique
):
    best = min(loss for step, loss in held_out_losses(technique_runs / technique).items() if step)
    own = dict.fromkeys(("model_name_or_path", "text_format", "max_length"))
    argv = flags(tmp_path / "unused", adapter_path=technique_runs / technique / "best", **own)
    assert run([*argv, "--eval_only"]) == 0
    assert printed_loss(capsys) == [f"{best:.4f}"]
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_logged_held_out_loss_is_that_of_transformers_on_the_model_that_was_saved(
    technique_runs, rows, bytes_tokenizer, technique
):
    model = modify_llm.load_trained(technique_runs / technique / "final").eval()
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    loss, tokens = plain_loss(model, dataset.split(0.2, 42)[1])
    logged = metrics(technique_runs / technique)[-1]
    assert (logged["step"], logged["eval_tokens"]) == (4, tokens)
    assert logged["eval_loss"] == pytest.approx(loss, abs=1e-5)


def test_evaluation_starts_as_many_workers_as_it_is_told_to(flags, tmp_path, monkeypatch):
    started, start = [], multiprocessing.Process.start
    monkeypatch.setattr(
        multiprocessing.Process, "start", lambda self: (started.append(self), start(self))
    )
    for number in (0, 1):
        started.clear()
        assert run([*flags(tmp_path / "unused", num_workers=number), "--eval_only"]) == 0
        assert len(started) == number


def test_rows_of_hundreds_of_tokens_have_the_loss_that_transformers_gives_them(
    flags, tmp_path, bytes_tokenizer
):
    small_gpt2(n_positions=512).save_pretrained(tmp_path / "long")
    bytes_tokenizer.save_pretrained(tmp_path / "long")
    text = [
        {"q": "Q", "a": "".join(random.Random(k).choices("abc de", k=k))}
        for k in (500, 450, 380, 120, 3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(text))
    files = dict.fromkeys(("dataset_path", "eval_dataset_path"), tmp_path / "rows.json")
    settings = {
        "max_length": 512,
        "max_steps": 1,
        "modification_type": "full",
        "max_grad_norm": 0,
        "batch_size": 1,
    }
    argv = flags(tmp_path / "out", **files, **settings, model_name_or_path=tmp_path / "long")
    assert run([*argv, "--gradient_accumulation_steps=5"]) == 0
    model = small_gpt2(n_positions=512)
    dataset = data_pipeline.load_dataset(
        tmp_path / "rows.json", bytes_tokenizer, text_format=FORMAT
    )
    loss, _ = plain_loss(model, dataset, backward=True)
    assert held_out_losses(tmp_path / "out")[0] == pytest.approx(loss, abs=1e-5)
    ours = first_gradients(tmp_path / "out")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_without_an_adapter_the_untouched_base_is_evaluated(
    technique_runs, flags, tmp_path, capsys
):
    assert run([*flags(tmp_path / "unused"), "--eval_only"]) == 0
    assert printed_loss(capsys) == [f"{held_out_losses(technique_runs / 'lora')[0]:.4f}"]


def test_rows_beyond_the_models_positions_are_refused_in_evaluation_too(
    technique_runs, flags, tmp_path, capsys
):
    (tmp_path / "long.json").write_text(json.dumps([{"q": "Q", "a": "a" * 300}] * 2))
    argv = flags(tmp_path / "out", adapter_path=technique_runs / "lora" / "best", max_length=200)
    argv += ["--eval_dataset_path", str(tmp_path / "long.json"), "--eval_only"]
    assert "--max_length 200" in refused(argv, capsys)


def test_a_base_given_by_name_is_taken_even_where_the_name_is_the_flags_default(
    technique_runs, capsys
):
    argv = [
        "--adapter_path",
        str(technique_runs / "lora" / "best"),
        "--model_name_or_path=gpt2",
        "--prompt=x",
    ]
    assert "--model_name_or_path gpt2: " in refused(argv, capsys)


def test_an_adapters_own_technique_decides_the_learning_rate(technique_runs, flags, tmp_path):
    argv = flags(
        tmp_path, adapter_path=technique_runs / "prefix" / "best", learning_rate=None, max_steps=1
    )
    assert run([*argv, "--scheduler=constant"]) == 0
    assert logged_rates(tmp_path) == [
        modify_llm.TECHNIQUES["prefix"].learning_rate(
            modify_llm.with_defaults(modification_type="prefix")
        )
    ]
