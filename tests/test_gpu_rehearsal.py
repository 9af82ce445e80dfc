"""Claims about training on a GPU that a machine without one can check: see gpu_rehearsal.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu_rehearsal.py")
TECHNIQUES = [
    "LoRA", "LoRA on q and v", "LoRA with dropout", "DoRA", "LoRA, embeddings trained",
    "LoRA, checkpointing", "full", "full, checkpointing", "selective", "selective, head frozen",
    "adapters, pfeiffer", "adapters, houlsby", "prefix, embedding", "prefix, key_value",
    "prefix, key_value by an MLP", "IA3", "BitFit", "LayerNorms",
]  # fmt: skip


def rehearsed(what):
    """What gpu_rehearsal.py found, in a process of its own."""
    command = [sys.executable, str(SCRIPT), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def techniques():
    return rehearsed("techniques")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_step_mixes_no_devices_waits_once_and_releases_its_gradients(
    techniques, technique, precision
):
    assert techniques[f"{technique}, {precision}"] == {
        "raised": "", "step": ["tolist"], "gradients": 0, "evaluation": ["to the CPU"],
    }  # fmt: skip


def test_the_list_of_techniques_is_whole(techniques):
    assert len(techniques) == 2 * len(TECHNIQUES)


def test_what_a_cpu_forgives_is_found():
    found = rehearsed("mistakes")
    assert "at least two devices" in found["an arange without a device"]["raised"]
    assert "blocking copy" in found["a blocking copy"]["step"]
    assert "copy from memory that is not pinned" in found["a copy that is not pinned"]["step"]
    assert "item" in found["a float(loss)"]["step"]
    assert found["gradients kept"]["gradients"] > 0
