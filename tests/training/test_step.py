"""A step is the same however its rows are cut, and it is AdamW's on the mean loss over the tokens of the
whole window.

    python -m pytest tests/training/test_step.py
"""

import copy
import json
import math
import random

import pytest
import torch
from runs import (
    FORMAT,
    checkpoints,
    first_gradients,
    held_out_losses,
    in_micro_step,
    infinite_gradient,
    metrics,
    plain_loss,
    run,
    saved,
    small_gpt2,
    training_losses,
)
from safetensors.torch import load_file
from torch.nn import functional as F

import data_pipeline
import modify_llm
import train_llm


@pytest.fixture(scope="module")
def cut_three_ways(flags, tmp_path_factory):
    """The same 8 rows a step as 8 x 1, 2 x 4 and 1 x 8; the last step of each epoch has 5 rows."""
    directory, draw = tmp_path_factory.mktemp("cuts"), random.Random(1)
    lengths = [1, 60, 2, 45, 3, 30, 1, 55, 5, 20] * 3
    text = [
        {"q": f"Say {i}: " + "x " * (i % 3), "a": "".join(draw.choices("red blue", k=n))}
        for i, n in enumerate(lengths[:26])
    ]
    (directory / "rows.json").write_text(json.dumps(text))
    settings = {"dataset_path": directory / "rows.json", "max_steps": None, "epochs": 2}
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        cut = settings | {"batch_size": size, "gradient_accumulation_steps": steps}
        assert run(flags(directory / f"{size}x{steps}", **cut, learning_rate=3e-3)) == 0
    return directory


@pytest.mark.parametrize("cut", ["2x4", "1x8"])
def test_accumulated_micro_batches_equal_the_large_batch(cut_three_ways, cut):
    whole, parts = cut_three_ways / "8x1", cut_three_ways / cut
    assert len(training_losses(whole)) == 2 * 3
    assert training_losses(parts) == pytest.approx(training_losses(whole), rel=1e-6)
    assert list(held_out_losses(parts).values()) == pytest.approx(
        list(held_out_losses(whole).values()), rel=1e-6
    )
    norms = [
        [row["grad_norm"] for row in metrics(run_) if "grad_norm" in row] for run_ in (whole, parts)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    expected = load_file(whole / "final" / "adapter_model.safetensors")
    for name, tensor in load_file(parts / "final" / "adapter_model.safetensors").items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: n + text
        )


def test_two_steps_are_those_of_pytorchs_adamw_on_its_own_smoothed_cross_entropy(
    flags, tmp_path, rows, bytes_tokenizer
):
    """And what is logged is the loss without smoothing."""
    settings = {"label_smoothing": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_epsilon": 1e-3}
    settings |= {"modification_type": "full", "scheduler": "constant", "max_grad_norm": 0}
    settings |= {"max_samples": 8, "batch_size": 8, "gradient_accumulation_steps": 1}
    assert run(flags(tmp_path, **settings, max_steps=2, weight_decay=0)) == 0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    train_rows, model, plain = dataset.split(0.2, 42)[0], small_gpt2(), []
    adamw = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(0.8, 0.7), eps=1e-3, weight_decay=0
    )
    for _ in range(2):
        logits, labels = [], []
        for row in (train_rows[i] for i in range(8)):
            logits.append(model(row["input_ids"][None]).logits[0, :-1])
            labels.append(row["labels"][1:])
        logits, labels = torch.cat(logits), torch.cat(labels)
        plain.append(F.cross_entropy(logits, labels).item())
        F.cross_entropy(logits, labels, label_smoothing=0.2).backward()
        adamw.step()
        adamw.zero_grad()
    assert training_losses(tmp_path) == pytest.approx(plain, rel=1e-5)
    tensors = load_file(checkpoints(tmp_path)[-1])
    weights = {name: tensors[f"weight.{name}"] for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-4, atol=2e-5)


def total_norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def test_a_step_follows_the_mean_loss_over_the_tokens_of_the_whole_window(
    flags, tmp_path, rows, bytes_tokenizer
):
    one_step = {"max_steps": 1, "max_grad_norm": 0, "max_samples": 8, "modification_type": "full"}
    assert run(flags(tmp_path, **one_step, gradient_accumulation_steps=4)) == 0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    train_rows, model = dataset.split(0.2, 42)[0], small_gpt2()
    plain_loss(model, train_rows.select(torch.arange(len(train_rows)).numpy() < 8), backward=True)
    reference = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = first_gradients(tmp_path)
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
    assert metrics(tmp_path)[1]["grad_norm"] == pytest.approx(total_norm(reference), rel=1e-5)


@pytest.mark.parametrize("limit", [0.05, 1000.0])
def test_gradients_are_clipped_once_a_step_by_their_norm_over_all_parameters(
    flags, tmp_path, limit
):
    assert (
        run(flags(tmp_path, max_steps=1, max_grad_norm=limit, gradient_accumulation_steps=4)) == 0
    )
    norm = metrics(tmp_path)[1]["grad_norm"]
    assert 0.05 < norm < 1000
    assert total_norm(first_gradients(tmp_path)) == pytest.approx(min(limit, norm), rel=1e-4)


def test_weight_decay_spares_parameters_with_one_dimension(flags, tmp_path):
    """AdamW decays the weight itself by learning rate x decay, besides the same step."""
    for decay in (0.0, 0.5):
        argv = flags(
            tmp_path / str(decay), max_steps=1, weight_decay=decay, modification_type="full"
        )
        assert run([*argv, "--scheduler=constant"]) == 0
    start = dict(small_gpt2().named_parameters())
    plain, decayed = (
        load_file(tmp_path / d / "final" / "model.safetensors") for d in ("0.0", "0.5")
    )
    assert plain.keys() == decayed.keys()
    for name, tensor in plain.items():
        share = 0.01 * 0.5 if tensor.ndim > 1 else 0.0
        torch.testing.assert_close(
            decayed[name], tensor - share * start[name], rtol=0, atol=2e-8 if share else 0
        )


@pytest.mark.parametrize("technique", ["prefix", "key_value", "projected", "lora"])
def test_weight_decay_spares_prefixes(technique, flags, tmp_path):
    more = {"modification_type": "prefix", "prefix_length": 4, "trainable_modules": ["wpe"]}
    more |= {
        "prefix": {}, "key_value": {"prefix_type": "key_value"},
        "projected": {"prefix_type": "key_value", "prefix_projection_size": 8},
        "lora": {"modification_type": "lora", "prefix_length": None},
    }[technique]  # fmt: skip
    args = train_llm.resolve({k: v for k, v in more.items() if v} | {"dataset_path": "-"})
    optimizer = train_llm.make_optimizer(modify_llm.modify(small_gpt2(), args), args)
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    model = modify_llm.modify(small_gpt2(), args)
    assert len(decayed) == (
        1
        if technique != "lora"
        else sum(p.requires_grad and p.ndim > 1 for p in model.parameters())
    )


def test_lora_plus_steps_as_peft_s_optimizer_does():
    from peft.optimizers import create_loraplus_optimizer

    args = train_llm.resolve(
        {"dataset_path": "-", "lora_plus_ratio": 16.0, "learning_rate": 1e-3, "weight_decay": 0.1}
    )
    model = modify_llm.modify(small_gpt2(), args)
    twin = copy.deepcopy(model)
    optimizers = [
        train_llm.make_optimizer(model, args),
        create_loraplus_optimizer(
            twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
        ),
    ]
    for group in optimizers[0].param_groups:  # as train_step does
        group["lr"] = 1e-3 * group["lr_ratio"]
    ids = torch.arange(24).view(2, 12)
    for _ in range(20):
        for trained, optimizer in zip((model, twin), optimizers, strict=True):
            trained(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(twin.named_parameters())
    for name, parameter in modify_llm.trainable_state(model).items():
        torch.testing.assert_close(
            parameter, expected[name].detach(), rtol=0, atol=1e-4
        )  # of steps of 1e-3 and 16e-3


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_trains_a_frozen_base_to_the_same_weights(flags, tmp_path):
    assert run(flags(tmp_path / "without")) == 0
    assert run(flags(tmp_path / "with", gradient_checkpointing="true")) == 0
    assert training_losses(tmp_path / "with") == pytest.approx(
        training_losses(tmp_path / "without"), rel=1e-6
    )


def test_logging_evaluating_sampling_and_workers_never_change_the_weights(flags, tmp_path):
    dropouts = {
        "dropout": 0.1,
        "lora_dropout": 0.1,
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
    }
    assert run(flags(tmp_path / "quiet", **dropouts, log_interval=100, eval_interval=100)) == 0
    busy = {
        "num_samples": 2,
        "temperature": 0.9,
        "max_new_tokens": 4,
        "eval_interval": 2,
        "save_interval": 1,
    }
    assert run(flags(tmp_path / "busy", **(dropouts | busy), num_workers=1)) == 0
    assert saved(tmp_path / "busy" / "final") == saved(tmp_path / "quiet" / "final")


@pytest.mark.skipif(
    not train_llm.bf16_in_hardware(torch.device("cpu")), reason="no bf16 in this processor"
)
def test_bf16_follows_fp32(flags, tmp_path):
    for precision in ("fp32", "bf16"):
        assert run(flags(tmp_path / precision, precision=precision, modification_type="full")) == 0
    assert training_losses(tmp_path / "bf16") == pytest.approx(
        training_losses(tmp_path / "fp32"), abs=0.05
    )
    tensors = load_file(checkpoints(tmp_path / "bf16")[-1])
    assert {t.dtype for name, t in tensors.items() if "random" not in name} == {torch.float32}


def test_an_fp16_step_that_overflows_is_left_out_and_null_in_the_metrics(
    flags, tmp_path, monkeypatch
):
    """With the scaler of fp16 in use on a CPU: its arithmetic is the same."""
    monkeypatch.setattr(train_llm.Runtime, "fp16", True)
    with in_micro_step(4, infinite_gradient):  # in the second step
        assert run(flags(tmp_path, max_steps=4)) == 0
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in text and "NaN" not in text
    norms = [row["grad_norm"] for row in metrics(tmp_path) if "loss" in row]
    assert [norm is None for norm in norms] == [False, True, False, False]
    state = train_llm.read_checkpoint(checkpoints(tmp_path)[-1])
    assert state["grad_scaler"]["scale"] == 2**15  # halved once
    steps = saved(checkpoints(tmp_path)[-1])
    taken = {v[2] for k, v in steps.items() if ": step." in k}
    assert taken == {torch.tensor(3.0).numpy().tobytes()}  # AdamW's own count, of four
