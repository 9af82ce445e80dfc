"""Answers in a batch are those that transformers gives to each prompt alone, and their scores sacreBLEU's.

python -m pytest tests/training/test_answers.py
"""

import json
import re
import shutil
import sys
from argparse import Namespace

import pytest
import torch
from runs import CPU, EOS, TECHNIQUES, metrics, refused, run, small_gpt2, technique_model
from transformers.utils import logging as transformers_logging

import data_pipeline
import train_llm


def test_the_bases_generation_config_does_not_touch_the_answers(flags, tmp_path, small_base):
    base, answers = tmp_path / "base", []
    shutil.copytree(small_base, base)
    settings = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    settings |= {"repetition_penalty": 9.0, "min_new_tokens": 3, "suppress_tokens": [1, 2, 3]}
    for config in ({}, settings):
        (base / "generation_config.json").write_text(json.dumps(config))
        argv = flags(tmp_path / f"out{len(config)}", model_name_or_path=base, num_samples=2)
        assert run(argv) == 0
        answers.append((tmp_path / f"out{len(config)}" / "predictions.jsonl").read_text())
    assert answers[0] == answers[1]


def test_equal_prompts_at_a_temperature_get_different_answers_and_the_same_again(finished, capsys):
    asked = [f"--adapter_path={finished[0] / 'final'}", "--temperature=1", "--max_new_tokens=20"]
    asked += ["--prompt=a", "--prompt=a", "--device=cpu", "--precision=fp32"]
    answers = []
    for _ in range(2):
        assert run(asked) == 0
        answers.append(re.findall(r"^Answer: (.*)", capsys.readouterr().out, re.M))
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_an_answers_indentation_stays_and_half_a_character_goes(finished, monkeypatch, capsys):
    asked = [f"--adapter_path={finished[0] / 'final'}", "--prompt=a", "--device=cpu"]
    said = [("\n    return x\n", True), (" Paris", True)]
    monkeypatch.setattr(train_llm, "generate_answers", lambda *_, **__: said)
    assert run([*asked, "--prompt=b"]) == 0
    assert "Answer:     return x\n" in (out := capsys.readouterr().out)
    assert "Answer: Paris\n" in out


def answer_settings(**changes):
    return Namespace(**train_llm.DEFAULTS | {"max_new_tokens": 12} | changes)


PROMPTS = [[65, 66, 67], [70] * 30, [80, 81], list(range(65, 82)), [90] * 117]  # 128 positions


@pytest.mark.parametrize(
    ("technique", "settings"),
    [
        *((technique, {}) for technique in TECHNIQUES),
        ("prefix", {"repetition_penalty": 1.3}),
        ("lora", {"no_repeat_ngram_size": 2}),
        ("prefix", {"num_beams": 3, "length_penalty": 0.5}),
    ],
)
def test_answers_in_a_batch_are_those_that_transformers_gives_to_each_prompt_alone(
    technique, settings, bytes_tokenizer
):
    model, expected = technique_model(technique, small_gpt2(initializer_range=0.5)).eval(), []
    room = model.config.n_positions - train_llm.prefix_length(model)
    ends = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
    for prompt in PROMPTS:
        chosen = ends | settings | {"max_new_tokens": min(12, room - len(prompt))}
        ids = model.generate(torch.tensor([prompt]), **chosen)[0, len(prompt) :].tolist()
        cut = ids[: ids.index(EOS)] if EOS in ids else ids
        expected.append((bytes_tokenizer.decode(cut).removesuffix("\ufffd"), EOS in ids))
    args = answer_settings(**settings)
    with train_llm.attention_without_mask(model):  # as samples are taken in training
        answers = train_llm.generate_answers(PROMPTS, model, bytes_tokenizer, args, CPU)
    assert answers == expected


def test_drawn_answers_are_the_seeds_and_leave_trainings_random_state_alone(bytes_tokenizer):
    model, state, args = small_gpt2(), torch.get_rng_state(), answer_settings(temperature=1.0)
    drawn = []
    for seed, first in ((1, 0), (1, 0), (2, 0), (1, 32)):  # first: of a later part of a file
        args.seed = seed
        drawn += [
            train_llm.generate_answers(PROMPTS, model, bytes_tokenizer, args, CPU, first=first)
        ]
    assert drawn[0] == drawn[1]
    assert all(drawn[0] != other for other in drawn[2:])
    assert torch.equal(torch.get_rng_state(), state)


def test_ends_of_text_in_a_batch_of_one_length_are_not_called_padding(bytes_tokenizer, monkeypatch):
    model, warned = small_gpt2(pad_token_id=EOS), []
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "warning_once", warned.append)
    prompts = [[65, EOS], [66, EOS]]
    train_llm.generate_answers(prompts, model, bytes_tokenizer, answer_settings(), CPU)
    assert not warned and model.config.pad_token_id == EOS


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_by_their_probabilities(temperature, top_p, bytes_tokenizer):
    """Of the model's own softmax; with top_p, of the likeliest tokens alone that hold this much."""
    model, prompt = small_gpt2(initializer_range=0.5), [65, 66, 67]
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    likeliest = expected.sort(descending=True)
    kept = likeliest.indices[: 1 + int((likeliest.values.cumsum(0) < top_p).sum())]
    expected = torch.zeros(257).index_copy(0, kept, expected[kept] / expected[kept].sum())
    args, drawn = answer_settings(temperature=temperature, top_p=top_p, max_new_tokens=1), []
    tokenizer = Namespace(
        eos_token_id=EOS, pad=bytes_tokenizer.pad, decode=lambda ids: drawn.extend(ids) or ""
    )
    train_llm.generate_answers([prompt] * 3200, model, tokenizer, args, CPU)
    found = torch.bincount(torch.tensor(drawn), minlength=257) / len(drawn)
    if top_p == 1:
        assert expected[EOS] < 0.01  # an end would not be among what was decoded
    assert (found - expected).abs().max() < 0.03
    assert not found[expected == 0].any()


def test_a_conversation_is_read_whole_in_the_format_of_turns_and_ctrl_c_ends_an_answer(
    monkeypatch, capsys, bytes_tokenizer
):
    typed, asked = ["Ctrl-C", "one", "two", "three"], []

    def answer(prompts, _model, _tokenizer, _args, _runtime, streamer):
        asked.append(bytes_tokenizer.decode(prompts[0]))
        streamer.on_finalized_text(f" answer {len(asked)}")
        if len(asked) == 1:
            raise KeyboardInterrupt

    def typing(_):
        if not typed:
            raise EOFError
        if typed[0] == "Ctrl-C":
            del typed[0]
            raise KeyboardInterrupt
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(train_llm, "generate_answers", answer)
    model = small_gpt2(n_positions=312)
    args = answer_settings(text_format="messages", max_new_tokens=100)
    train_llm.chat(args, CPU, model, bytes_tokenizer)
    turns = {"messages": [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "two"},
    ]}  # fmt: skip
    expected = data_pipeline.encode_prompt(turns, "messages", bytes_tokenizer)
    assert asked[1] == bytes_tokenizer.decode(expected)
    # 100 tokens stay free for the answer: the oldest turns make room
    assert "three" in asked[2] and "answer 1" not in asked[2]
    assert "answer 3" in capsys.readouterr().out


def test_the_scores_of_an_evaluations_answers_are_sacrebleus(flags, tmp_path, capsys):
    sacrebleu = pytest.importorskip("sacrebleu")
    argv = flags(tmp_path, num_samples=4, eval_answers=4, eval_interval=3, max_new_tokens=5)
    assert run(argv) == 0
    text = (tmp_path / "predictions.jsonl").read_text()
    predictions = [json.loads(line) for line in text.splitlines()]
    answers = [row["tuned"] for row in predictions]
    references = [[row["reference"] for row in predictions]]
    scored = [row for row in metrics(tmp_path) if "eval_chrf" in row]
    assert [row["step"] for row in scored] == [3, 6]
    assert scored[-1] == {
        "step": 6, "epoch": 0, "eval_chrf": sacrebleu.corpus_chrf(answers, references).score,
        "eval_bleu": sacrebleu.corpus_bleu(answers, references).score,
        "eval_stopped": sum(row["stopped"] for row in predictions) / 4,
        "eval_answer_length": sum(len(text.encode()) for text in answers) / 4,
        "eval_reference_length": sum(len(text) for text in references[0]) / 4,
    }  # fmt: skip
    line = f"Held-out answers: chrF {scored[-1]['eval_chrf']:.1f}, BLEU"
    assert line in (tmp_path / "final" / "README.md").read_text()
    assert capsys.readouterr().out.count(line) >= 2  # at the evaluation, and at the end
    again = flags(tmp_path, eval_answers=4, max_new_tokens=5, adapter_path=tmp_path / "final")
    assert run([*again, "--eval_only"]) == 0
    assert line in capsys.readouterr().out


def test_eval_answers_without_sacrebleu_are_refused(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    find_spec = train_llm.importlib.util.find_spec
    monkeypatch.setattr(
        train_llm.importlib.util, "find_spec", lambda n: None if n == "sacrebleu" else find_spec(n)
    )
    said = refused(flags(tmp_path / "out", eval_answers=2), capsys)
    assert "--eval_answers" in said and "pip install sacrebleu" in said
