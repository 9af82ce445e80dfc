"""A prefix is to the model what the tokens that it is made of are, in logits, gradients, padded rows and
generation.

    python -m pytest tests/techniques/test_prefixes.py
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from small_models import (
    HIDDEN,
    LAYERS,
    LENGTH,
    POSITIONS,
    PREFIXES,
    TECHNIQUES,
    close,
    generated,
    logits,
    modified,
    perturb,
    small,
    token_ids,
)
from tiny import tiny_gpt2
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from modify_llm import apply_prefix, load_trained, parameter_counts, save_trained, trainable_state

every_prefix = pytest.mark.parametrize("settings", PREFIXES.values(), ids=PREFIXES.keys())
both_prefixes = pytest.mark.parametrize("prefix_type", ["embedding", "key_value"])
START = [7, 250, 31, 4, 112, 5]  # real tokens to start a prefix from


def prefixed(prefix_type, model=None, noise=0.5, **settings):
    settings = {"init_ids": START, "prefix_length": LENGTH, **settings}
    return perturb(
        apply_prefix(small() if model is None else model, prefix_type=prefix_type, **settings),
        noise,
    )


def after_tokens(model, tokens, ids):
    """A plain model's logits on the text, with real tokens put before it."""
    start = torch.tensor(tokens).expand(len(ids), -1)
    return logits(model, torch.cat([start, ids], 1))[:, len(tokens) :]


@pytest.mark.parametrize(
    "start", [START, [7, 250, 31, 31, 112, 7], [7, 250]], ids=["distinct", "repeated", "too few"]
)
@pytest.mark.parametrize(
    ("prefix_type", "projection_size", "relative"),
    [("embedding", 0, 1e-5), ("key_value", 0, 1e-5), ("key_value", 40, 1e-3)],
    ids=["embedding", "key_value", "reparametrised"],
)
def test_a_prefix_starts_as_the_real_tokens_it_is_made_of(
    prefix_type, projection_size, relative, start
):
    base = small()
    settings = {"noise": 0, "projection_size": projection_size, "init_ids": start}
    model = prefixed(prefix_type, copy.deepcopy(base), **settings)
    tokens = (start * LENGTH)[:LENGTH]
    assert close(logits(model), after_tokens(base, tokens, token_ids()), relative)
    assert not close(logits(model), logits(base), 0.1)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
def test_an_embedding_prefix_has_the_logits_and_gradients_of_concatenated_embeddings(
    dtype, relative
):
    """The prefix is computed once for the batch; plainly, it stands before each row."""
    beside = ["wte", "wpe", "ln_1", "mlp.c_proj", "ln_f"]
    model = prefixed("embedding", noise=0.3, trainable_modules=beside).to(dtype).train()
    reference = small().to(dtype).train()
    reference.load_state_dict({n: p for n, p in model.state_dict().items() if "prefix" not in n})
    ids = token_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 3:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)

    prefix = model.transformer.prefix.embedding.detach().clone().requires_grad_()
    whole = reference(
        inputs_embeds=torch.cat([prefix.expand(3, -1, -1), reference.transformer.wte(ids)], 1),
        attention_mask=F.pad(mask, (LENGTH, 0), value=1),
        # the loss is over the text alone, where nothing before the first token predicts it
        labels=F.pad(labels[:, 1:], (LENGTH + 1, 0), value=-100),
    )
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    real = mask.bool()
    assert close(output.logits[real], whole.logits[:, LENGTH:][real], relative)
    assert output.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)

    output.loss.backward()
    whole.loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    expected["transformer.prefix.embedding"] = prefix.grad
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 1 + 2 + LAYERS * (2 + 2) + 2
    for name, gradient in trained.items():
        assert close(gradient, expected[name], relative), name


@both_prefixes
def test_the_base_s_dropout_stays_out_of_a_prefix_s_start(prefix_type):
    base = small(embd_pdrop=0.5, resid_pdrop=0.5)
    model = apply_prefix(
        copy.deepcopy(base).train(), LENGTH, prefix_type=prefix_type, init_ids=START
    )
    assert model.training
    assert close(logits(model), after_tokens(base, START, token_ids()))


def test_a_prefix_starts_from_real_tokens_by_default():
    base = small()
    model = apply_prefix(copy.deepcopy(base), 4)
    rows = model.transformer.prefix.prompt_embeddings()[:, None] == base.transformer.wte.weight
    assert rows.all(-1).any(-1).all() and len(set(rows.all(-1).nonzero()[:, 1].tolist())) == 4


def test_a_prefix_starts_from_the_words_of_a_text_read_by_the_base_s_tokenizer(tmp_path):
    small().save_pretrained(tmp_path)
    flags = {"modification_type": "prefix", "prefix_init_text": "low lower"}
    with pytest.raises(ValueError, match=r"--prefix_init_text 'low lower': .*no tokenizer"):
        modified(str(tmp_path), **flags)
    vocabulary = {"low": 5, "er": 9, "l": 1, "o": 2, "w": 3, "e": 4, "r": 6}
    merges = [("l", "o"), ("lo", "w"), ("e", "r")]
    backend = Tokenizer(BPE({**vocabulary, "lo": 7}, merges))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    model = modified(str(tmp_path), **flags)
    words = model.transformer.wte.weight[[5, 5, 9] * (LENGTH // 3)]
    assert torch.equal(model.transformer.prefix.embedding, words)
    save_trained(model, tmp_path / "run")
    (tmp_path / "tokenizer.json").unlink()  # loading needs no words
    assert torch.equal(load_trained(tmp_path / "run").transformer.prefix.embedding, words)


STRIDES = 8


def counting_rows(generator, rows, stride=None):
    """Rows that count modulo 32 in steps of a stride; a random stride stands in the first token."""
    strides = (
        torch.randint(1, STRIDES + 1, (rows, 1), generator=generator) if stride is None else stride
    )
    counted = (torch.randint(32, (rows, 1), generator=generator) + strides * torch.arange(12)) % 32
    return counted if stride is not None else torch.cat([32 + strides, counted], 1)


@pytest.fixture(scope="module")
def counting_base():
    """A model that has learnt what each of the tokens 33 to 40 asks it to do."""
    model = tiny_gpt2(vocab_size=48, n_positions=32, bos_token_id=0, eos_token_id=0).train()
    generator, optimizer = (
        torch.Generator().manual_seed(0),
        torch.optim.AdamW(model.parameters(), 3e-3),
    )
    for _ in range(300):
        ids = counting_rows(generator, 32)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefix_type": "key_value"}, {"prefix_type": "key_value", "projection_size": 32}],
    ids=["embedding", "key_value", "reparametrised"],
)
def test_a_real_start_trains_faster_than_a_random_one(counting_base, settings):
    def mean_loss(seed=0, random_std=None):
        torch.manual_seed(seed)
        model = apply_prefix(copy.deepcopy(counting_base), 4, init_ids=[33, 35, 39, 34], **settings)
        if random_std:
            for parameter in trainable_state(model).values():
                nn.init.normal_(parameter, std=random_std)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(20):
            # Token 37 would ask for this stride; it is not among those that the prefix starts from.
            ids = counting_rows(generator, 16, stride=5)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    for std in (0.02, 1.0):
        assert mean_loss() < 0.5 * sum(mean_loss(seed, std) for seed in range(3)) / 3


@both_prefixes
def test_a_missing_attention_mask_means_that_all_tokens_count(prefix_type):
    model = prefixed(prefix_type)
    assert close(logits(model), logits(model, attention_mask=torch.ones_like(token_ids())), 1e-6)


@both_prefixes
def test_right_padding_leaves_each_row_as_it_is_alone(prefix_type):
    model, ids = prefixed(prefix_type), token_ids(3, 9)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 5, 2)):
        mask[row, length:] = 0
    padded = logits(model, ids, attention_mask=mask)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    losses = []
    for row, length in enumerate((9, 5, 2)):
        alone = logits(model, ids[row : row + 1, :length])
        assert close(padded[row, :length], alone[0], 1e-5)
        losses += F.cross_entropy(alone[0, :-1], ids[row, 1:length], reduction="none").tolist()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beams", "several samples"],
)
@both_prefixes
def test_generation_sees_the_prefix_as_it_would_the_tokens_it_is_made_of(
    prefix_type, decoding, use_cache
):
    base, ids = small(), token_ids(2, 5)
    model = prefixed(prefix_type, copy.deepcopy(base), noise=0)
    start = torch.tensor(START).expand(2, -1)
    expected = generated(base, torch.cat([start, ids], 1), **decoding)[:, LENGTH:]
    assert torch.equal(generated(model, ids, use_cache=use_cache, **decoding), expected)
    assert not torch.equal(generated(base, ids, **decoding), expected)


@both_prefixes
def test_hidden_states_and_attentions_are_those_of_the_text_behind_the_prefix(prefix_type):
    base, ids = small(attn_implementation="eager"), token_ids(2, 5)
    expected = base(
        torch.cat([torch.tensor(START).expand(2, -1), ids], 1), output_hidden_states=True
    )
    model = prefixed(prefix_type, base, noise=0)
    output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == LAYERS + 1
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert close(ours, theirs[:, LENGTH:])
    assert [weights.shape[2:] for weights in output.attentions] == [(5, LENGTH + 5)] * LAYERS
    chosen = model(input_ids=ids, output_hidden_states=[1]).hidden_states
    assert torch.equal(chosen[1], output.hidden_states[1]) and chosen[0] is None


@pytest.mark.parametrize("use_cache", [True, False])
@both_prefixes
def test_rows_padded_on_the_left_generate_as_they_do_alone(prefix_type, use_cache):
    model, ids = prefixed(prefix_type), token_ids(3, 7)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 5)):
        mask[row, :pads] = 0
    together = generated(model, ids * mask, attention_mask=mask, use_cache=use_cache)
    for row, pads in enumerate((0, 3, 5)):
        assert torch.equal(
            together[row, 7:], generated(model, ids[row : row + 1, pads:])[0, 7 - pads :]
        )


@both_prefixes
def test_text_and_prefix_fill_the_positions_and_no_more(prefix_type):
    model, room = prefixed(prefix_type), POSITIONS - LENGTH
    assert logits(model, token_ids(1, room)).isfinite().all()
    with pytest.raises(ValueError, match=f"{POSITIONS + 1} tokens.* {POSITIONS} positions"):
        logits(model, token_ids(1, room + 1))
    with pytest.raises(ValueError, match=f"{POSITIONS} positions"):
        generated(model, token_ids(1, room - 3), max_new_tokens=8)
    with pytest.raises(ValueError, match=f"prefix_length {POSITIONS}"):
        apply_prefix(small(), POSITIONS)


@every_prefix
def test_the_loss_of_a_prefixed_model_is_over_the_text_alone(settings, base):
    model = perturb(modified(base, **settings))
    ids = token_ids()
    expected = F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@every_prefix
def test_every_virtual_token_gets_a_gradient(settings, base):
    model = modified(base, **settings)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(
        p.grad.flatten(1).any(1).all()
        for n, p in model.named_parameters()
        if n.endswith("embedding")
    )
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_the_reparametrisation_is_computed_out_when_saved(base, tmp_path):
    model = perturb(modified(base, **TECHNIQUES["reparametrised prefix"]))
    save_trained(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "prompt_embeddings": (LENGTH, LAYERS * 2 * HIDDEN)
    }
    loaded = load_trained(tmp_path)
    assert parameter_counts(loaded)[1] == LENGTH * LAYERS * 2 * HIDDEN
    assert close(logits(loaded), logits(model))


@pytest.mark.parametrize("prefix_type", ["embedding", "key_value"])
def test_a_prefix_on_a_base_in_bf16_runs_under_autocast(base, prefix_type):
    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        apply_prefix(model, 5, prefix_type=prefix_type)
        inside = logits(model)
    assert close(inside.float(), logits(model).float(), 0.05)


@both_prefixes
def test_a_prefixed_transformer_takes_every_argument_by_position(prefix_type):
    body, ids = prefixed(prefix_type).transformer, token_ids()
    positions = torch.arange(9).flip(0)[None]
    by_name = body(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    by_position = body(ids, None, torch.ones_like(ids), None, positions)
    assert torch.equal(by_name.last_hidden_state, by_position.last_hidden_state)
    assert not torch.equal(body(ids).last_hidden_state, by_name.last_hidden_state)
