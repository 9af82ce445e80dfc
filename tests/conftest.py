"""Small models and data for all tests: nothing is downloaded, nothing comes from outside the repository."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from tiny import tiny_gpt2
from transformers import GPT2LMHeadModel

from data_pipeline import load_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def control_c_is_not_ignored():
    """As a script's `&` leaves it: for these tests and the processes that they start it is put back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("gpt2")


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return tiny_gpt2()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer) -> Path:
    """The tiny model as a local directory, with its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tiny_gpt2().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
