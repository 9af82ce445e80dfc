"""A checkpoint that is damaged, forged or of another run is never loaded as if it were good.

python -m pytest tests/training/test_damaged_checkpoints.py
"""

import hashlib
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import RESUME, checkpoints, outcome, refused, run, saved, small_gpt2, snapshot
from safetensors.torch import load_file, save_file

import train_llm
from train_llm import Runtime


def flip_a_byte(checkpoint):
    content = bytearray((checkpoint / "optimizer.safetensors").read_bytes())
    content[-100] ^= 1
    (checkpoint / "optimizer.safetensors").write_bytes(content)


def truncate(checkpoint):
    content = (checkpoint / "trainable.safetensors").read_bytes()
    (checkpoint / "trainable.safetensors").write_bytes(content[: len(content) // 2])


def empty_the_manifest(checkpoint):
    (checkpoint / "manifest.json").write_text("")


def edit_the_manifest(checkpoint):
    """The sum of a file is changed with the file, but not the manifest's own."""
    content = bytearray((checkpoint / "optimizer.safetensors").read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[-100] ^= 1
    (checkpoint / "optimizer.safetensors").write_bytes(content)
    text = (checkpoint / "manifest.json").read_text()
    assert before in text
    (checkpoint / "manifest.json").write_text(
        text.replace(before, hashlib.sha256(content).hexdigest())
    )


def drop_a_file(checkpoint):
    (checkpoint / "random.safetensors").unlink()


def sign(checkpoint, **more):
    """Fits the manifest to the files, as one who knows its form can."""
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != "manifest.json")
    files = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names
    } | more
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(
        json.dumps({"files": files, "manifest_sha256": digest})
    )


def name_a_file_outside(checkpoint):
    (checkpoint.parent.parent / "x").write_text("x")
    sign(checkpoint, **{"../../x": hashlib.sha256(b"x").hexdigest()})


def name_an_absolute_file(checkpoint):
    outside = checkpoint.parent.parent / "x"
    outside.write_text("x")
    sign(checkpoint, **{str(outside): hashlib.sha256(b"x").hexdigest()})


def link_a_file(checkpoint):
    outside = (checkpoint / "state.json").rename(checkpoint.parent.parent / "state.json")
    (checkpoint / "state.json").symlink_to(outside)


def change_tensors(checkpoint, change, file="trainable"):
    tensors = load_file(checkpoint / f"{file}.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / f"{file}.safetensors")
    sign(checkpoint)


def put_nan(checkpoint):
    change_tensors(checkpoint, lambda tensors: next(iter(tensors.values())).fill_(math.nan))


def put_nan_into_the_optimizer(checkpoint):
    change_tensors(
        checkpoint, lambda ts: next(t for t in ts.values() if t.ndim).fill_(math.nan), "optimizer"
    )


def add_a_tensor(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.update(stranger=torch.zeros(2)))


def lose_a_tensor(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.pop(min(tensors)))


def misshape_a_tensor(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.update({min(tensors): torch.zeros(3)}))


def lose_a_moment(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.pop(min(tensors)), "optimizer")


def name_a_file_that_no_disk_can_hold(checkpoint):
    sign(checkpoint, **{"n" * 300: "0"})


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant_a_pickle(checkpoint):
    (checkpoint / "trainable.safetensors").write_bytes(
        pickle.dumps(Payload(checkpoint.parent.parent / "executed"))
    )
    sign(checkpoint)


DAMAGES = (
    flip_a_byte, truncate, drop_a_file, empty_the_manifest, edit_the_manifest, name_a_file_outside,
    name_an_absolute_file, link_a_file, put_nan, put_nan_into_the_optimizer, add_a_tensor, lose_a_tensor,
    misshape_a_tensor, lose_a_moment, plant_a_pickle,
    name_a_file_that_no_disk_can_hold,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_warns_of_a_damaged_checkpoint_and_goes_on_from_the_older_one(
    flags, half, half_done, capsys, damage
):
    newest = checkpoints(half)[-1]
    damage(newest)
    capsys.readouterr()
    assert run([*flags(half, eval_interval=2), *RESUME]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^WARNING:.*{newest.name}", out, re.M)
    assert re.search(r"^INFO:.*step_00000004 at step 4$", out, re.M)
    assert outcome(half) == half_done[1]
    assert not (half / "executed").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_asked_for_by_path_is_refused_and_nothing_changes(
    flags, half, capsys, damage
):
    newest = checkpoints(half)[-1]
    damage(newest)
    before = snapshot(half)
    assert newest.name in refused(
        [*flags(half, eval_interval=2), "--resume_from", str(newest)], capsys
    )
    assert snapshot(half) == before
    assert not (half / "executed").exists()


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
