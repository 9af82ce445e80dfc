"""A random GPT-2 in a moment: nothing is downloaded."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


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
