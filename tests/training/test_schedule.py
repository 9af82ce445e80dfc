"""The learning rate follows its schedule, counted in optimizer steps, and is the one that moves the
weights.

    python -m pytest tests/training/test_schedule.py
"""

import re
from argparse import Namespace

import pytest
import torch
from matplotlib.figure import Figure
from runs import logged_rates, metrics, run
from safetensors.torch import load_file
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from train_llm import learning_rate_at


@pytest.mark.parametrize(
    ("scheduler", "warmup", "min_lr", "total", "expected"),
    [
        ("warmup_cosine", 4, 0.0, 15, {1: 0.25, 2: 0.5, 4: 1.0, 8: 0.75, 10: 0.5, 12: 0.25}),
        ("warmup_cosine", 4, 0.2, 15, {1: 0.25, 4: 1.0, 8: 0.8, 12: 0.4}),
        ("linear", 4, 0.0, 15, {1: 0.25, 4: 1.0, 8: 2 / 3, 12: 1 / 3, 15: 1 / 12}),
        ("linear", 0, 0.5, 10, {1: 1.0, 6: 0.75, 10: 0.55}),
        ("cosine", 4, 0.0, 12, {1: 1.0, 7: 0.5}),
        ("constant", 0, 0.1, 13, {1: 1.0, 7: 1.0, 13: 1.0}),
        ("constant", 4, 0.1, 13, {1: 0.25, 3: 0.75, 4: 1.0, 13: 1.0}),
        ("warmup_cosine", 10, 0.0, 5, {1: 0.1, 5: 0.5}),
        ("warmup_cosine", 1, 0.0, 2, {1: 1.0, 2: 0.5}),
        ("warmup_cosine", 0, 0.0, 1, {1: 1.0}),
    ],
)
def test_the_learning_rate_at_points_computed_by_hand(scheduler, warmup, min_lr, total, expected):
    args = Namespace(scheduler=scheduler, learning_rate=3.0, warmup_steps=warmup, min_lr=3 * min_lr)
    rates = {step: learning_rate_at(step, total, args) for step in expected}
    assert rates == pytest.approx({step: 3 * share for step, share in expected.items()}, abs=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
@pytest.mark.parametrize("scheduler", ["warmup_cosine", "linear", "cosine", "constant"])
def test_from_the_peak_on_the_rates_are_those_of_transformers_schedulers(scheduler, warmup, total):
    """Up to it each is transformers' of the step after, whose first step is at a rate of zero."""
    makers = {
        "linear": get_linear_schedule_with_warmup,
        "constant": lambda *schedule: get_constant_schedule_with_warmup(*schedule[:2]),
    }
    args = Namespace(scheduler=scheduler, learning_rate=0.3, warmup_steps=warmup, min_lr=0.0)
    peak = 1 if scheduler == "cosine" else max(1, warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    make = makers.get(scheduler, get_cosine_schedule_with_warmup)
    theirs, rates = make(optimizer, peak - 1, total), {}
    for step in range(1, total + 1):
        rates[step] = theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()
    warming_up = make(torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.3), warmup, 10**6)
    for step in range(1, total + 1):
        expected = rates[step] if step >= peak else 0.3 * warming_up.lr_lambdas[0](step)
        assert learning_rate_at(step, total, args) == pytest.approx(expected, abs=1e-12), step
        assert expected > 0  # no step is without effect


def test_the_logged_rate_is_the_schedules_counted_in_optimizer_steps(flags, tmp_path):
    assert run(flags(tmp_path, scheduler="linear", warmup_steps=2, learning_rate=0.04)) == 0
    assert logged_rates(tmp_path) == pytest.approx(
        [0.02, 0.04, 0.032, 0.024, 0.016, 0.008], abs=1e-12
    )


def test_the_logged_rate_is_the_one_that_moves_the_weights(flags, tmp_path):
    """AdamW's first step moves a weight by the rate itself, whatever the size of its gradient."""
    argv = flags(
        tmp_path, max_steps=1, warmup_steps=4, learning_rate=0.04, weight_decay=0, log_interval=1
    )
    assert run(argv) == 0
    assert logged_rates(tmp_path) == [0.01]
    tensors = load_file(tmp_path / "final" / "adapter_model.safetensors")
    moved = torch.cat(
        [tensor.flatten() for name, tensor in tensors.items() if "lora_B" in name]
    ).abs()
    assert moved.median().item() == pytest.approx(0.01, rel=1e-3)


def test_warm_up_that_was_not_asked_for_is_a_tenth_of_the_run(flags, tmp_path):
    assert run(flags(tmp_path, max_steps=20, eval_fraction=0, learning_rate=1.0)) == 0
    rates = logged_rates(tmp_path)
    assert rates[:2] == [0.5, 1.0]
    assert 0.9 < rates[2] < 1.0


def test_a_constant_rate_warms_up_where_that_is_asked_for(flags, tmp_path):
    constant = {"scheduler": "constant", "max_steps": 3, "learning_rate": 0.8}
    assert run(flags(tmp_path / "plain", **constant)) == 0
    assert run(flags(tmp_path / "warmed", **constant, warmup_steps=2)) == 0
    assert logged_rates(tmp_path / "plain") == [0.8, 0.8, 0.8]
    assert logged_rates(tmp_path / "warmed") == [0.4, 0.8, 0.8]


def test_a_warm_up_longer_than_the_run_is_allowed_with_a_warning(flags, tmp_path, capsys):
    assert run(flags(tmp_path, max_steps=2, warmup_steps=8, learning_rate=0.8)) == 0
    assert logged_rates(tmp_path) == pytest.approx([0.1, 0.2])
    assert re.search(r"^WARNING:.*--warmup_steps 8", capsys.readouterr().out, re.M)


def test_the_curve_of_the_learning_rate_is_exact(flags, tmp_path):
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        assert run(flags(tmp_path, max_steps=30, scheduler="linear")) == 0
    curve = drawn[0].axes[2].lines[-1].get_ydata()
    rates = [row["lr"] for row in metrics(tmp_path) if "lr" in row]
    assert list(curve) == pytest.approx(rates, rel=1e-9)
