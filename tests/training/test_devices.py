"""Devices that are not here, as a run would meet them.

python -m pytest tests/training/test_devices.py
"""

import os

import pytest
import torch
from runs import refused, run

import train_llm


@pytest.mark.parametrize(
    "machine, device, dtype",
    [
        ({"cuda": True, "bf16": True}, "cuda:0", torch.bfloat16),
        ({"cuda": True, "bf16": False}, "cuda:0", torch.float16),  # a T4, whose bf16 is emulated
        ({"mps": True}, "mps", torch.float32),
        ({"cpu": {"avx512_bf16": True}}, "cpu", torch.bfloat16),
        ({"cpu": {"avx2": True}}, "cpu", torch.float32),
    ],
)
def test_auto_takes_the_best_device_and_no_emulated_precision(machine, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in machine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        including_emulation or machine["bf16"]
    ))  # fmt: skip
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: machine.get("cpu", {}))
    runtime = train_llm.choose_runtime(train_llm.resolve({"dataset_path": "-"}))
    assert (str(runtime.device), runtime.dtype) == (device, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_refused(flags, tmp_path, capsys, nothing_loads):
    assert "--device cuda" in refused(flags(tmp_path / "out", device="cuda"), capsys)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize(
    ("says", "status", "told"),
    [
        ("Tesla T4, 525.60.13", 0, "Tesla T4, driver 525.60.13: this PyTorch is built "),
        ("NVIDIA-SMI has failed", 9, "nvidia-smi says: NVIDIA-SMI has failed"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_told_with_its_driver(
    says, status, told, flags, tmp_path, capsys, monkeypatch
):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    argv = flags(tmp_path / "out", max_steps=1, eval_fraction=0, device="auto")
    assert run(argv) == 0
    assert (
        f"WARNING:train_llm:Training on the cpu, not on the GPU: {told}" in capsys.readouterr().out
    )
    assert told in refused(flags(tmp_path / "out2", device="cuda"), capsys)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert run([*argv, "--overwrite_output_dir"]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_more_processes_than_gpus_and_several_on_a_mac_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"--device cuda: 2 GPUs here; .*--nproc_per_node=2"):
        train_llm.choose_device("auto", 4, local_rank=2)
    assert str(train_llm.choose_device("auto", 2, local_rank=1)) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"--device mps: .*--device cpu"):
        train_llm.choose_device("auto", 2)
