"""LoRA and DoRA compute and train what PEFT's do, on whole layers and on thirds, and merge into the
weights and out of them again.

    python -m pytest tests/techniques/test_lora.py
"""

import copy
import logging
import math

import peft
import pytest
import torch
from small_models import HIDDEN, LAYERS, close, logits, our_name, perturb, plain, small, token_ids
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from modify_llm import LoRALayer, apply_lora, merge_lora, trainable_state

CONV1D = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def peft_twin(model, ours, **config):
    """PEFT's LoRA on a copy of the base, with the same A and B."""
    settings = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **config}
    twin = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    state = {n: p for n, p in ours.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".lora_" in name:
                parameter.copy_(state.pop(our_name(name)))
    assert not state
    return twin


@pytest.mark.parametrize(
    ("targets", "rank", "alpha", "options", "their_options"),
    [
        (["c_attn", "c_proj", "c_fc"], 4, 8.0, {}, {}),
        (["attn.c_proj"], 1, 3.0, {}, {}),
        (["c_fc", "lm_head"], 6, 6.0, {}, {}),
        (["c_attn", "c_fc"], 5, 3.0, {"scaling": "rank_stabilized"}, {"use_rslora": True}),
        (["c_attn", "c_proj", "c_fc"], 3, 4.0, {"dora": True}, {"use_dora": True}),
        (["lm_head", "mlp.c_proj"], 2, 9.0, {"dora": True}, {"use_dora": True}),
        (["c_fc", "c_attn"], 2, 2.0, {"layers": [0, 2]}, {"layers_to_transform": [0, 2]}),
    ],
)
def test_lora_trains_as_peft_does(targets, rank, alpha, options, their_options):
    model = small(tie_word_embeddings="lm_head" not in targets)
    ours = apply_lora(copy.deepcopy(model), rank, alpha, target_modules=targets, **options)
    ours, their_options = perturb(ours, 0.02).train(), {"target_modules": targets, **their_options}
    theirs = peft_twin(model, ours, r=rank, lora_alpha=alpha, **their_options).train()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
        for m in (ours, theirs)
    ]
    for step in range(20):
        ids = token_ids(4, 12, seed=step)
        outputs = [m(input_ids=ids, labels=ids) for m in (ours, theirs)]
        for output in outputs:
            output.loss.backward()
        assert close(outputs[0].logits, outputs[1].logits)
        assert outputs[0].loss.item() == pytest.approx(outputs[1].loss.item(), rel=1e-5)
        gradients = {our_name(n): p.grad for n, p in theirs.named_parameters()}
        gradients = {name: grad for name, grad in gradients.items() if grad is not None}
        own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        assert own.keys() == gradients.keys()
        for name, gradient in own.items():
            assert close(gradient, gradients[name]), (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not close(outputs[0].logits, model(input_ids=ids).logits, 1e-3)


@pytest.mark.parametrize("kind", ["Conv1D", "Linear"])
def test_dora_is_its_equation_also_under_dropout_and_when_merged(kind):
    """W' = m (W0 + s B A) / ||W0 + s B A|| by output (Liu et al., 2024, equation 5)."""
    torch.manual_seed(0)
    original = nn.Linear(20, 24) if kind == "Linear" else Conv1D(24, 20)
    layer = LoRALayer(original.requires_grad_(False), 3, 2.0, dropout=0.5, dora=True)
    W0 = (original.weight if kind == "Linear" else original.weight.T).clone()  # (out, in)
    x = torch.randn(7, 20)
    assert torch.allclose(layer.eval()(x), original(x), atol=1e-6)  # starts as the original
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.mul_(torch.rand(24) + 0.5)
    direction = W0 + 2.0 / 3 * layer.lora_B @ layer.lora_A
    m = layer.lora_magnitude_vector
    W = m[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x), x @ W.T + original.bias, atol=1e-5)

    layer.train()
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(1)  # PEFT drops what the update sees, not what the base does
    assert torch.allclose(layer(x), x @ W0.T + original.bias + dropped @ (W - W0).T, atol=1e-5)

    layer.eval().merge()
    assert torch.allclose(layer(x), x @ W.T + original.bias, atol=1e-5)
    layer.unmerge()
    now = original.weight if kind == "Linear" else original.weight.T
    assert torch.allclose(now, W0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["Conv1D", "Linear", "thirds of a Conv1D"])
def test_lora_s_product_is_its_plain_version_in_value_and_gradient(kind, bias):
    """The expression in LoRAProduct's docstring, under autograd."""
    torch.manual_seed(0)
    inner, outer = 20, 24
    original = nn.Linear(inner, outer) if kind == "Linear" else Conv1D(outer, inner)
    original.bias = nn.Parameter(torch.randn(outer)) if bias else None
    thirds = "qv" if kind == "thirds of a Conv1D" else ""
    layer = LoRALayer(original.requires_grad_(False), 3, 2.0, thirds=thirds)
    nn.init.normal_(layer.lora_B)
    x, upstream = torch.randn(2, 7, inner, requires_grad=True), torch.randn(2, 7, outer)

    W = original.weight.T if kind == "Linear" else original.weight  # (in, out)
    b, A, B, s = original.bias, layer.lora_A, layer.full_B(), 2.0 / 3
    tokens = x.flatten(0, 1)
    expected = torch.addmm(b, tokens, W) if bias else tokens @ W
    expected = (expected + s * (tokens @ A.T) @ B.T).view(2, 7, outer)
    h = layer(x)
    assert type(h.grad_fn).__name__ == "LoRAProductBackward"  # the layer takes this path
    assert h.dtype == torch.float32 and close(h, expected, 1e-6)

    inputs = [x, layer.lora_A, layer.lora_B]
    gradients = torch.autograd.grad(expected, inputs, upstream)
    for own, theirs in zip(torch.autograd.grad(h, inputs, upstream), gradients, strict=True):
        assert close(own, theirs, 1e-6)
    # In the lowest layer x needs no gradient: A and B have theirs all the same.
    lowest = torch.autograd.grad(layer(x.detach()), inputs[1:], upstream)
    for own, theirs in zip(lowest, gradients[1:], strict=True):
        assert close(own, theirs, 1e-6)


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("c_proj", ["attn.c_proj", "mlp.c_proj"]),
        ("attn.c_proj", ["attn.c_proj"]),
        ("mlp.c_proj", ["mlp.c_proj"]),
        ("c_fc", ["mlp.c_fc"]),
        ("c_attn.k", ["attn.c_attn"]),
    ],
)
def test_a_target_matches_by_suffix_and_its_number_of_layers_is_logged(caplog, target, layers):
    with caplog.at_level(logging.INFO, logger="modify_llm"):
        model = apply_lora(small(), target_modules=[target])
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    assert wrapped == {f"transformer.h.{i}.{name}" for i in range(LAYERS) for name in layers}
    assert f"{target}: {len(wrapped)} layers" in caplog.text


def test_a_full_name_matches_one_layer():
    model = apply_lora(small(n_layer=12), target_modules=["h.1.mlp.c_fc"])
    assert set(trainable_state(model)) == {f"transformer.h.1.mlp.c_fc.lora_{part}" for part in "AB"}


def test_lora_trains_a_and_b_alone_and_names_them_so():
    model = apply_lora(small(), 4)
    expected = {
        f"transformer.h.{i}.{n}.lora_{part}" for i in range(LAYERS) for n in CONV1D for part in "AB"
    }
    state = trainable_state(model)
    assert set(state) == expected
    assert state["transformer.h.0.mlp.c_proj.lora_A"].shape == (4, 4 * HIDDEN)
    assert state["transformer.h.0.mlp.c_proj.lora_B"].shape == (HIDDEN, 4)
    assert "transformer.h.0.mlp.c_proj.original_layer.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["c_attn.q", "c_attn.v"]])
def test_a_starts_uniform_within_its_fan_in_and_b_at_zero(targets):
    base = small(n_embd=64)
    model = apply_lora(copy.deepcopy(base), 16, target_modules=targets)
    for layer in (module for module in model.modules() if isinstance(module, LoRALayer)):
        bound = 1 / math.sqrt(layer.original_layer.weight.shape[0])  # Conv1D: (in, out)
        assert 0.95 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.lora_B.any()
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("thirds", ["q", "k", "v", "vq", "qkv"])
def test_a_third_changes_its_own_columns_alone(thirds):
    model = perturb(
        apply_lora(small(), 3, 6.0, target_modules=[f"c_attn.{third}" for third in thirds])
    )
    layer, x = model.transformer.h[1].attn.c_attn, torch.randn(2, 5, HIDDEN)
    expected = torch.zeros(2, 5, 3 * HIDDEN)
    for i, third in enumerate(sorted(thirds, key="qkv".index)):
        A, B = layer.lora_A[3 * i : 3 * i + 3], layer.lora_B[HIDDEN * i : HIDDEN * (i + 1)]
        column = HIDDEN * "qkv".index(third)
        expected[..., column : column + HIDDEN] = 6.0 / 3 * (x @ A.T @ B.T)
    update = layer(x) - layer.original_layer(x)
    assert close(update, expected, 1e-5)
    untouched = expected == 0
    assert untouched.any() == (len(thirds) < 3) and not update[untouched].any()
    assert close(x @ layer.get_delta_weight(), expected, 1e-5)


def test_dropout_acts_on_the_input_of_a_and_only_while_training():
    model = perturb(apply_lora(small(), 4, 8.0, dropout=0.5))
    layer, x = model.transformer.h[0].mlp.c_fc, torch.randn(2, 5, HIDDEN)
    A, B = layer.lora_A, layer.lora_B
    assert close(layer(x), layer.original_layer(x) + 2 * x @ A.T @ B.T)
    layer.train()
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(3)
    assert close(layer(x), layer.original_layer(x) + 2 * dropped @ A.T @ B.T)


class Linear8bit(nn.Linear):
    """A stand-in for bitsandbytes' layers, which hold integers."""

    def __init__(self, original):
        super().__init__(1, 1)
        self.weight = nn.Parameter(original.weight.to(torch.int8), requires_grad=False)


def test_a_quantised_layer_is_no_target():
    model = small()
    model.transformer.h[1].mlp.c_fc = Linear8bit(model.transformer.h[1].mlp.c_fc)
    with pytest.raises(ValueError, match=r"c_fc: \S+ is a Linear8bit; LoRA wraps Conv1D and"):
        apply_lora(model, target_modules=["c_fc"])


def test_the_tied_head_is_no_target():
    with pytest.raises(ValueError, match=r"lm_head.*shares its weight"):
        apply_lora(small(), target_modules=["lm_head"])


@pytest.mark.parametrize(
    "targets", [["c_attn", "c_proj", "c_fc"], ["c_attn.q", "c_attn.v"], ["c_fc", "lm_head"]]
)
def test_a_merged_model_is_a_plain_one_with_equal_logits(targets):
    base = small(tie_word_embeddings="lm_head" not in targets)
    model = perturb(apply_lora(copy.deepcopy(base), 4, 8.0, target_modules=targets))
    expected = logits(model)
    merged = merge_lora(model)
    assert (
        type(merged) is GPT2LMHeadModel and merged.state_dict().keys() == base.state_dict().keys()
    )
    assert {type(m) for m in merged.modules()} == {type(m) for m in base.modules()}
    assert close(logits(merged), expected, 1e-4) and not close(expected, logits(base), 1e-2)


@pytest.mark.parametrize("target", ["c_attn", "c_attn.v", "lm_head"])
def test_merging_is_explicit_goes_back_and_is_refused_twice(target):
    model = small(tie_word_embeddings=target != "lm_head")
    model = perturb(apply_lora(model, target_modules=[target]))
    layer = model.lm_head if target == "lm_head" else model.transformer.h[0].attn.c_attn
    original, expected = layer.original_layer.weight.clone(), logits(model)
    assert torch.equal(layer.original_layer.weight, original), "eval() alone merged"
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    assert not close(layer.original_layer.weight, original, 1e-3) and close(
        logits(model), expected, 1e-4
    )
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert close(layer.original_layer.weight, original, 1e-6) and close(
        logits(model), expected, 1e-4
    )


def test_merging_a_model_whose_layers_are_partly_merged_adds_each_update_once():
    model = perturb(apply_lora(small()))
    expected = logits(model)
    model.transformer.h[1].mlp.c_fc.merge()
    assert close(logits(merge_lora(model)), expected, 1e-4)
    with pytest.raises(ValueError, match="a plain model"):
        merge_lora(small())


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 32)])
def test_a_lora_layer_takes_what_the_layer_that_it_wraps_takes(shape):
    layer = LoRALayer(torch.nn.Linear(32, 6).requires_grad_(False), 2, 4.0)
    x = torch.randn(shape, requires_grad=True)
    expected = layer.original_layer(x)
    assert layer(x).shape == expected.shape
    layer(x).sum().backward()
    assert close(layer(x), expected) or not x.numel()


@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], ["c_attn.q", "c_attn.v"]])
def test_lora_with_dropout_trains_on_a_bf16_model_without_autocast(base, targets):
    exact = perturb(apply_lora(plain(base), target_modules=targets), 0.02)
    model = apply_lora(plain(base).bfloat16(), target_modules=targets, dropout=0.5)
    model.load_state_dict(trainable_state(exact), strict=False)
    assert logits(model).dtype == torch.bfloat16 and close(logits(model), logits(exact), 0.05)
    loss = model.train()(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_the_weight_of_a_wrapped_layer_is_the_one_it_multiplies_by():
    model = perturb(apply_lora(small(tie_word_embeddings=False), target_modules=["lm_head"]))
    head, x = model.lm_head, torch.randn(5, HIDDEN)
    assert close(x @ head.weight.T, head(x), 1e-5)
    gradients = [torch.autograd.grad(h.sum(), head.lora_B) for h in (x @ head.weight.T, head(x))]
    assert close(gradients[0][0], gradients[1][0], 1e-5)
    before = head.weight.detach().clone()
    head.merge()
    assert close(head.weight, before, 1e-6)
    head = apply_lora(small(tie_word_embeddings=False), dropout=0.1, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="--lora_dropout: acts on a layer's input"):
        head.train().lm_head.weight  # noqa: B018
