"""A checkpoint that is damaged, forged or of another run is never loaded as if it were good.

python -m pytest tests/training/test_damaged_checkpoints.py
"""

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import RESUME, checkpoints, outcome, refused, run, saved, small_gpt2, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_llm
from train_llm import Runtime


def replace_bytes(checkpoint, old, new):
    content = checkpoint.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    checkpoint.write_bytes(content.replace(old, new))


def flip_a_byte_of_a_tensor(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[-100] ^= 1
    checkpoint.write_bytes(content)


def flip_a_byte_of_the_progress(checkpoint):
    replace_bytes(checkpoint, rb"{\"progress\": {\"step\": 5", rb"{\"progress\": {\"step\": 4")


def flip_a_byte_of_the_sum(checkpoint):
    with safe_open(checkpoint, "pt") as file:
        digest = file.metadata()["sha256"].encode()
    replace_bytes(checkpoint, digest, digest[:-1] + (b"0" if digest[-1:] != b"0" else b"1"))


def exchange_two_names(checkpoint):
    """Tensors of one shape, each whole."""
    content = checkpoint.read_bytes()
    a, b = (
        b'"exp_avg.transformer.h.0.attn.c_attn.lora_A"',
        b'"weight.transformer.h.0.attn.c_attn.lora_A"',
    )
    assert content.count(a) == content.count(b) == 1
    checkpoint.write_bytes(content.replace(a, b"?").replace(b, a).replace(b"?", b))


def truncate(checkpoint):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])


def empty(checkpoint):
    checkpoint.write_bytes(b"")


def make_it_longer(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes() + b"more")


def fill_with_garbage(checkpoint):
    checkpoint.write_bytes(b"\xff" * 1000)  # a header of 2^64 - 1 bytes


def make_it_a_directory(checkpoint):
    checkpoint.unlink()
    checkpoint.mkdir()


def link_to_nothing(checkpoint):
    checkpoint.unlink()
    checkpoint.symlink_to(checkpoint.with_name("gone"))


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant_a_pickle(checkpoint):
    checkpoint.write_bytes(pickle.dumps(Payload(checkpoint.parent.parent / "executed")))


def plant_pytorchs_pickle(checkpoint):
    torch.save({"weight": Payload(checkpoint.parent.parent / "executed")}, checkpoint)


def drop_the_metadata(checkpoint):
    save_file(load_file(checkpoint), checkpoint)


def forge(checkpoint, change):
    """Writes it anew with changed tensors or state and the sum that fits, as one who knows its form can."""
    with safe_open(checkpoint, "pt") as file:
        state = json.loads(file.metadata()["state"])
    tensors = load_file(checkpoint)
    change(tensors, state)
    text = json.dumps(state)
    metadata = {"state": text, "sha256": train_llm.checksum(text, tensors)}
    save_file(tensors, checkpoint, metadata)


def of_kind(tensors, kind):
    return min(name for name in tensors if name.startswith(f"{kind}."))


def put_nan(checkpoint):
    forge(checkpoint, lambda tensors, _: tensors[of_kind(tensors, "weight")].fill_(math.nan))


def put_nan_into_the_optimizer(checkpoint):
    forge(checkpoint, lambda tensors, _: tensors[of_kind(tensors, "exp_avg_sq")].fill_(math.nan))


def add_a_tensor(checkpoint):
    forge(checkpoint, lambda tensors, _: tensors.update(stranger=torch.zeros(2)))


def lose_a_tensor(checkpoint):
    forge(checkpoint, lambda tensors, _: tensors.pop(of_kind(tensors, "weight")))


def misshape_a_tensor(checkpoint):
    forge(
        checkpoint, lambda tensors, _: tensors.update({of_kind(tensors, "weight"): torch.zeros(3)})
    )


def lose_a_moment(checkpoint):
    forge(checkpoint, lambda tensors, _: tensors.pop(of_kind(tensors, "exp_avg")))


def lose_a_count_of_steps(checkpoint):
    forge(checkpoint, lambda tensors, _: tensors.pop(of_kind(tensors, "step")))


def lose_the_progress(checkpoint):
    forge(checkpoint, lambda _, state: state.pop("progress"))


def add_unknown_progress(checkpoint):
    forge(checkpoint, lambda _, state: state["progress"].update(exec="rm"))


DAMAGES = (
    flip_a_byte_of_a_tensor, flip_a_byte_of_the_progress, flip_a_byte_of_the_sum, exchange_two_names, truncate, empty,
    make_it_longer, fill_with_garbage, make_it_a_directory, link_to_nothing, plant_a_pickle, plant_pytorchs_pickle,
    drop_the_metadata, put_nan, put_nan_into_the_optimizer, add_a_tensor, lose_a_tensor, misshape_a_tensor,
    lose_a_moment, lose_a_count_of_steps, lose_the_progress, add_unknown_progress,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_path_and_passed_over_by_auto(
    flags, half, half_done, capsys, damage
):
    """By path nothing changes; under auto a warning names it, and the run goes on from the older one."""
    newest = checkpoints(half)[-1]
    damage(newest)
    before = snapshot(half)
    argv = flags(half, eval_interval=2)
    assert newest.name in refused([*argv, "--resume_from", str(newest)], capsys)
    assert snapshot(half) == before
    assert run([*argv, *RESUME]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^WARNING:.*skipped: .*{newest.name}: ", out, re.M)
    assert re.search(r"^INFO:.*step_00000004 at step 4$", out, re.M)
    assert outcome(half) == half_done[1]
    assert not (half / "executed").exists()


def test_a_sum_that_fits_is_what_lets_a_forged_checkpoint_in(flags, half, half_done):
    """So the tests above show what is found besides the sum."""
    forge(checkpoints(half)[-1], lambda *_: None)
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert outcome(half) == half_done[1]


def test_a_checkpoint_that_is_a_link_is_read(flags, half, half_done, tmp_path):
    newest = checkpoints(half)[-1]
    shutil.move(newest, tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert run([*flags(half, eval_interval=2), "--resume_from", str(newest)]) == 0
    assert outcome(half) == half_done[1]


def test_a_checkpoint_or_run_directory_by_path_resumes_to_the_same_bits(
    flags, half, half_done, tmp_path
):
    again = Path(shutil.copytree(half, tmp_path / "again"))
    assert run([*flags(half, eval_interval=2), "--resume_from", str(checkpoints(half)[1])]) == 0
    assert outcome(half) == half_done[1]
    assert run([*flags(again, eval_interval=2), "--resume_from", str(again)]) == 0
    assert outcome(again) == half_done[1]


def test_a_run_goes_on_in_fp16_from_a_checkpoint_written_without_a_gradient_scaler(
    flags, half, monkeypatch
):
    monkeypatch.setattr(
        train_llm, "choose_runtime", lambda _: Runtime(torch.device("cpu"), torch.float16)
    )
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    assert checkpoints(half)[-1].name == "step_00000006"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_rank": 2}, "lora_rank"),
        ({"modification_type": "adapter"}, "modification_type"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"batch_size": 4}, "batch_size"),
        ({"seed": 7}, "seed"),
        ({"eval_fraction": 0.1}, "eval_fraction"),
    ],
)
def test_a_checkpoint_continues_no_other_run(flags, half, capsys, changes, named):
    before = snapshot(half)
    assert f"--{named}" in refused(
        [*flags(half, **({"eval_interval": 2} | changes)), *RESUME], capsys
    )
    assert snapshot(half) == before


def test_a_changed_dataset_is_refused_on_resuming(flags, half, rows, capsys, tmp_path):
    text = json.loads(rows.read_text())
    text[3]["a"] += "!"
    (tmp_path / "changed.json").write_text(json.dumps(text))
    before = snapshot(half)
    argv = flags(half, eval_interval=2, dataset_path=tmp_path / "changed.json")
    assert "dataset" in refused([*argv, *RESUME], capsys)
    assert snapshot(half) == before


def test_another_base_model_is_refused_on_resuming(flags, half, capsys, tmp_path, bytes_tokenizer):
    small_gpt2(seed=1).save_pretrained(tmp_path / "other")
    bytes_tokenizer.save_pretrained(tmp_path / "other")
    before = snapshot(half)
    assert "base model" in refused(
        [*flags(half, model_name_or_path=tmp_path / "other"), *RESUME], capsys
    )
    assert snapshot(half) == before


def test_a_run_whose_final_is_damaged_is_not_finished(flags, tmp_path):
    argv = flags(tmp_path, max_steps=2)
    assert run(argv) == 0
    expected = saved(tmp_path / "final")
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(b"")
    assert run([*argv, *RESUME]) == 0
    assert saved(tmp_path / "final") == expected
