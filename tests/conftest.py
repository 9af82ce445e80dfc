"""Small models and data for all tests: nothing is downloaded, nothing comes from outside the repository."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from data_pipeline import load_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("gpt2")


def tiny_gpt2(seed: int = 0, **overrides) -> GPT2LMHeadModel:
    """A random GPT-2 with non-zero biases, in eval mode and without dropout: nothing in it is trivially zero."""
    settings = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 128, "vocab_size": 50257}
    dropouts = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**settings, **dropouts, **overrides}))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.eval()


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
