"""Selective freezing and full fine-tuning train exactly what they name, and backward stops where nothing
below trains.

    python -m pytest tests/techniques/test_selective_and_full.py
"""

import pytest
import torch
from small_models import LAYERS, modified, small, token_ids, trained_modules

from modify_llm import apply_selective_freezing, trainable_state


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"freeze_layers": "0-1"}, {"h.2", "wte", "ln_f"}),
        ({"freeze_layers": [0, 2]}, {"h.1", "wte", "ln_f"}),
        ({"freeze_layers": [], "freeze_head": True}, {"h.0", "h.1", "h.2"}),
        (
            {"freeze_layers": [1], "freeze_head": True, "trainable_modules": ["wpe"]},
            {"h.0", "h.2", "wpe"},
        ),
        ({"freeze_layers": "0-2", "freeze_head": True, "trainable_modules": "ln_f"}, {"ln_f"}),
    ],
)
def test_selective_freezing_trains_the_other_blocks_and_the_head(base, settings, expected):
    model = modified(base, modification_type="selective", **settings)
    assert trained_modules(model) == expected
    blocks = [set(trainable_state(block)) for block in model.transformer.h]
    assert all(not names or len(names) == 12 for names in blocks)


@pytest.mark.parametrize(
    ("layers", "said"),
    [([0, 3], " 3: the model has layers 0 to 2"), ([-1], ": invalid numbers_and_ranges")],
)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(layers, said):
    with pytest.raises(ValueError, match=f"--freeze_layers{said}"):
        apply_selective_freezing(small(), layers)


def test_full_finetuning_trains_everything(base):
    model = modified(base, modification_type="full")
    assert set(trainable_state(model)) == set(dict(model.named_parameters()))


def test_the_optimizer_holds_no_state_for_frozen_weights(base):
    model = modified(base, modification_type="selective", freeze_layers=[0, 1])
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    held = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert held == set(trainable_state(model)) and len(held) == 12 + 3


@pytest.mark.parametrize(
    ("freeze_head", "reached"), [(True, [False, False, True]), (False, [True, True, True])]
)
def test_backward_stops_below_the_lowest_layer_that_trains(base, freeze_head, reached):
    model = modified(
        base, modification_type="selective", freeze_layers=[0, 1], freeze_head=freeze_head
    )
    fired = {}

    def watch(i):
        def hook(module, inputs, output):
            fired[i] = False
            if output.requires_grad:
                output.register_hook(lambda _: fired.__setitem__(i, True))

        return hook

    for i, block in enumerate(model.transformer.h):
        block.register_forward_hook(watch(i))
    model.transformer.wte.register_forward_hook(watch("wte"))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert [fired[i] for i in range(LAYERS)] == reached and fired["wte"] is not freeze_head
