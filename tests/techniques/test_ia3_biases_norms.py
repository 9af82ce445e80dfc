"""IA3, BitFit and LayerNorm tuning train what PEFT's do, and what changes weights alone merges.

python -m pytest tests/techniques/test_ia3_biases_norms.py
"""

import peft
import pytest
import torch
from small_models import TECHNIQUES, close, logits, modified, our_name, perturb, plain, token_ids

from modify_llm import apply_ia3, final_modify, load_trained, main, save_trained, trainable_state


def test_ia3_trains_as_peft_does(base):
    config = peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)
    theirs = peft.get_peft_model(plain(base), config).train()
    ours = apply_ia3(plain(base)).train()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
        for m in (ours, theirs)
    ]
    for step in range(20):
        ids = token_ids(4, 12, seed=step)
        outputs = [m(input_ids=ids, labels=ids) for m in (ours, theirs)]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert close(outputs[0].logits, outputs[1].logits)
    trained = {our_name(n): p.flatten() for n, p in theirs.named_parameters() if "ia3_l" in n}
    state = trainable_state(ours)
    assert state.keys() == trained.keys()
    assert all(close(state[name], trained[name], 1e-4) for name in trained)


@pytest.mark.parametrize("whole", ["wte", "lm_head"])
def test_an_ia3_that_peft_made_beside_a_module_trained_whole_loads(base, tmp_path, whole):
    config = peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True, modules_to_save=[whole])
    theirs = perturb(peft.get_peft_model(plain(base), config))
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_trained(tmp_path / "peft", base)
    assert close(logits(ours), logits(theirs))
    trained = {our_name(n) for n in trainable_state(theirs)}
    assert len(trainable_state(ours)) == len(trained)


def test_layernorm_tuning_trains_as_peft_does(base):
    theirs = peft.get_peft_model(plain(base), peft.LNTuningConfig(task_type="CAUSAL_LM")).train()
    ours = final_modify(model_name_or_path=base, modification_type="layernorm").train()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
        for m in (ours, theirs)
    ]
    for step in range(20):
        ids = token_ids(4, 12, seed=step)
        outputs = [m(input_ids=ids, labels=ids) for m in (ours, theirs)]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert close(outputs[0].logits, outputs[1].logits)


def test_bitfit_trains_every_bias_and_nothing_else(base):
    model = final_modify(model_name_or_path=base, modification_type="bitfit")
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert trainable_state(model).keys() == biases
    assert any(".ln_1." in name for name in biases) and any("c_attn" in name for name in biases)


@pytest.mark.parametrize("name", ["ia3", "ia3 and norms", "bitfit", "layernorm", "dora"])
def test_what_is_a_change_of_weights_merges(base, name, tmp_path):
    model = perturb(modified(base, **TECHNIQUES[name]), 0.05)
    expected = logits(model)
    save_trained(model, tmp_path / "trained")
    main(["--adapter_path", str(tmp_path / "trained"), "--merge_to", str(tmp_path / "merged")])
    assert close(logits(plain(tmp_path / "merged")), expected, 1e-4)
    assert not close(logits(plain(base)), expected, 1e-3)
