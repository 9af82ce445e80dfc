"""A model learns to answer, and prompts from flags, files and Python are asked in the format of its run.

python -m pytest tests/training/test_prompts.py
"""

import json
import os
import re
import shutil
import signal
import time
from argparse import Namespace

import pytest
from peft import LoraConfig, get_peft_model
from runs import (
    EOS,
    FORMAT,
    RESUME,
    held_out_losses,
    plain_loss,
    refused,
    run,
    small_gpt2,
    snapshot,
)
from tiny import tiny_gpt2
from transformers import GPT2LMHeadModel

import data_pipeline
import modify_llm
import train_llm


@pytest.fixture(scope="module")
def learned(flags, tmp_path_factory):
    """A run that learned four answers by heart, in a text format of its own."""
    directory = tmp_path_factory.mktemp("learned")
    colours = {"grass": "green", "snow": "white", "blood": "red", "sky": "blue"}
    lines = ["question,answer", *[f"{question}, {answer}" for question, answer in colours.items()]]
    (directory / "colours.csv").write_text("\n".join(lines))
    settings = {
        "dataset_path": directory / "colours.csv", "eval_dataset_path": directory / "colours.csv", "max_length": 40,
        "text_format": "Q: {question}\nA:||{answer}", "modification_type": "full", "max_steps": 80, "batch_size": 4,
        "gradient_accumulation_steps": 1, "eval_interval": 80, "num_samples": 4, "max_new_tokens": 20,
    }  # fmt: skip
    assert run(flags(directory / "out", **settings)) == 0
    return directory / "out", colours


def test_a_model_learns_to_answer_and_to_stop_by_itself(learned):
    rows_ = [
        json.loads(line) for line in (learned[0] / "predictions.jsonl").read_text().splitlines()
    ]
    expected = [(f"Q: {question}\nA:", f" {answer}") for question, answer in learned[1].items()]
    assert sorted((row["prompt"], row["tuned"]) for row in rows_) == sorted(expected)
    assert all(row["reference"] == row["tuned"] and row["stopped"] for row in rows_)
    assert not any(row["base"] == row["tuned"] for row in rows_)


def test_prompts_are_answered_in_the_runs_own_format_up_to_the_end_of_text(learned, capsys):
    assert (
        run(["--adapter_path", str(learned[0] / "best"), "--prompt", "grass", "--prompt=sky"]) == 0
    )
    out = capsys.readouterr().out
    assert re.findall(r"^Prompt: (.*)\nAnswer: (.*)$", out, re.M) == [
        ("grass", "green"),
        ("sky", "blue"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("asked.txt", "grass\n\nsky\n", ["grass", "sky"]),
        (
            "asked.jsonl",
            '{"question": "grass"}\n{"question": "sky"}\n',
            [{"question": "grass"}, {"question": "sky"}],
        ),
        ("asked.csv", "question\ngrass\nsky\n", [{"question": "grass"}, {"question": "sky"}]),
    ],
)
def test_a_file_of_prompts_is_answered_in_its_order_beside_it(
    name, content, prompts, learned, tmp_path
):
    (tmp_path / name).write_text(content)
    argv = ["--adapter_path", str(learned[0] / "best"), "--prompts_file", str(tmp_path / name)]
    assert run(argv) == 0
    (answers,) = tmp_path.glob(f"{name}.out-best.*.answers.jsonl")
    assert [json.loads(line) for line in answers.open()] == [
        {"prompt": prompt, "answer": answer, "stopped": True}
        for prompt, answer in zip(prompts, ["green", "blue"], strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xe9", "can't decode byte"),
        ("a.jsonl", b'{"question": "a"}\nnull\n', "row 2: None is neither a text nor fields"),
        ("a.jsonl", b'{"question": "a"}\n5\n', "row 2: 5 is neither a text nor fields"),
        ("a.jsonl", b'{"question": "a"}\n{"q": "a"}\n', "row 2: the format reads ['question']"),
        ("a.jsonl", b'{"question": "\\ud83d"}\n', "row 1: the prompt holds"),
        ("a.csv", b"question\na,b\n", "row 1: more fields than the header"),
        ("a.csv", b"question\ncaf\xe9\n", "row 1: "),
        ("a.jsonl", b'{"question": \n', "invalid JSON"),
        ("a.jsonl.gz", b"plain", "Not a gzipped file"),
        ("a.txt", b"\n", "holds no prompts"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_refused_by_its_name(
    name, content, said, learned, tmp_path, capsys
):
    (tmp_path / name).write_bytes(content)
    argv = ["--adapter_path", str(learned[0] / "best"), "--prompts_file", str(tmp_path / name)]
    error = refused(argv, capsys)
    assert f"--prompts_file {tmp_path / name}: " in error and said in error


def test_a_prompt_in_a_file_ends_at_the_lines_end_alone(learned, tmp_path):
    (tmp_path / "asked.txt").write_text("one\u2028still one\nanother\n", encoding="utf-8")
    settings = Namespace(prompts_file=str(tmp_path / "asked.txt"), text_format=FORMAT)
    read = [prompt for prompt, _ in train_llm.read_prompts(settings)]
    assert read == ["one\u2028still one", "another"]


def test_fields_that_are_no_turns_are_not_asked_as_an_empty_question():
    with pytest.raises(ValueError, match="neither 'messages' nor 'conversations'"):
        train_llm.prompt_fields({"prompt": "What?"}, "messages")
    turns = train_llm.prompt_fields('{"a": 1}', "messages")["messages"]
    assert turns == [{"role": "user", "content": '{"a": 1}'}]  # typed in a chat


def test_a_signal_ends_the_answers_after_training_at_once(flags, tmp_path, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the handler of the host program comes first

    monkeypatch.setattr(train_llm, "answer_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(flags(tmp_path, max_steps=1))
    assert (tmp_path / "final").exists()


@pytest.mark.parametrize(
    ("text", "read"),
    [("Hello", ["Hello"]), ("[a, b]", ["a", "b"]), ('"--x=1, y"', ["--x=1, y"]), ("[7]", ["7"])],
)
def test_a_configured_prompt_is_one_text_or_a_list(tmp_path, text, read):
    (tmp_path / "c.yaml").write_text(f"prompt: {text}\n")
    assert train_llm.flags_of(tmp_path / "c.yaml", "--config c.yaml")["prompt"] == read


def test_an_answer_that_is_cut_off_is_marked(learned, capsys):
    argv = [
        "--adapter_path",
        str(learned[0] / "best"),
        "--prompt",
        "grass",
        "--max_new_tokens",
        "4",
    ]
    assert run(argv) == 0
    assert re.search(r"^Answer: gre \[\.\.\.\]$", capsys.readouterr().out, re.M)


def test_a_seed_fixes_what_a_temperature_draws(learned, capsys):
    argv = [
        "--adapter_path",
        str(learned[0] / "best"),
        "--prompt",
        "Who?",
        "--temperature=1.5",
        "--max_new_tokens=30",
    ]
    answers = []
    for seed in ("1", "1", "2"):
        assert run([*argv, "--seed", seed]) == 0
        answers.append(re.search(r"^Answer: .*", capsys.readouterr().out, re.M | re.S)[0])
    assert answers[0] == answers[1] != answers[2]


def test_a_run_with_prompts_answers_them_when_it_is_trained(flags, tmp_path, capsys):
    assert run(flags(tmp_path, max_steps=1, prompt=["one", "two"], max_new_tokens=2)) == 0
    assert re.findall(r"^Prompt: (.*)$", capsys.readouterr().out, re.M) == ["one", "two"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("x" * 300, "positions"),
        ('{"answer": "only"}', "reads ['question'], a JSON object of them; 'question' is missing"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(learned, capsys, prompt, said):
    assert said in refused(["--adapter_path", str(learned[0] / "best"), "--prompt", prompt], capsys)


@pytest.mark.parametrize(
    ("text", "text_format", "read"),
    [
        ("Hi", "output", "Hi"),
        ("Hi", "alpaca", data_pipeline.PROMPT_WITHOUT_INPUT.format(instruction="Hi")),
        (
            '{"instruction": "Add", "input": "1, 2"}',
            "alpaca",
            data_pipeline.PROMPT_WITH_INPUT.format(instruction="Add", input="1, 2"),
        ),
        ("Hi", "Q: {question}\nA:||{answer}", "Q: Hi\nA:"),
        ("{Hi}", "Q: {question}\nA:||{answer}", "Q: {Hi}\nA:"),
        ("Hi", "Q: {input}\nA:||{answer}", "Q: Hi\nA:"),
        ('{"q": "Hi"}', "Q: {q} {input}\nA:||{answer}", "Q: Hi \nA:"),
        ('{"q": "Hi", "input": null}', "Q: {q} {input}\nA:||{answer}", "Q: Hi \nA:"),
        ("Hi", "messages", data_pipeline.PROMPT_WITHOUT_INPUT.format(instruction="Hi")),
        (
            '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}',
            "messages",
            "S\n\n### Instruction:\nQ\n\n### Response:",
        ),
    ],
)
def test_a_prompt_is_read_in_the_format_of_the_run(tokenizer, text, text_format, read):
    ids = train_llm.prompt_ids(text, tiny_gpt2(), tokenizer, text_format)
    assert tokenizer.decode(ids) == read


def test_the_end_of_text_inside_a_prompt_is_text_as_in_training(small_base):
    tokenizer = data_pipeline.load_tokenizer(str(small_base))
    ids = train_llm.prompt_ids("a<|endoftext|>b", small_gpt2(), tokenizer, "output")
    assert EOS not in ids and bytes(ids) != b"" and len(ids) == len("a<|endoftext|>b")


def test_a_model_whose_vocabulary_is_too_small_for_the_prompt_is_refused(capsys):
    sizes = [
        "--hidden_size=16",
        "--num_attention_heads=2",
        "--num_hidden_layers=1",
        "--vocab_size=100",
    ]
    assert "embeddings for 100" in refused(
        ["--from_scratch", *sizes, "--prompt=hello", "--device=cpu"], capsys
    )


def test_a_finished_run_still_answers_a_prompt(flags, finished, capsys):
    before = snapshot(finished[0])
    argv = flags(
        finished[0], max_steps=None, epochs=2, num_samples=2, max_new_tokens=5, log_interval=2
    )
    assert run([*argv, *RESUME, "--prompt", "a"]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "Answer: " in out and snapshot(finished[0]) == before


@pytest.mark.parametrize("name", ["demo", "output_dir", "model_name_or_path", "epochs"])
def test_what_a_directory_was_trained_with_sets_no_other_flag(
    flags, finished, small_base, tmp_path, name
):
    shutil.copytree(finished[0] / "final", tmp_path / "final")
    (tmp_path / "final" / "manifest.json").unlink()
    settings = modify_llm.read_json(tmp_path / "final" / "modification.json")
    modify_llm.write_json(tmp_path / "final" / "modification.json", settings | {name: 7})
    args = train_llm.resolve({"adapter_path": str(tmp_path / "final"), "prompt": ["a"]})
    default = None if name == "model_name_or_path" else train_llm.DEFAULTS[name]
    assert getattr(args, name) == default


def test_a_result_made_of_links_loads_as_the_hubs_cache_is(finished, tmp_path):
    for file in (finished[0] / "final").iterdir():
        (tmp_path / file.name).symlink_to(file)
    base = modify_llm.load_trained(finished[0] / "final").base_name
    assert modify_llm.load_trained(tmp_path, base).modification["modification_type"] == "lora"


def test_a_lora_that_peft_made_is_used_with_its_bases_tokenizer_and_its_own_rank(
    flags, tmp_path, small_base, capsys
):
    base = GPT2LMHeadModel.from_pretrained(small_base)
    made = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    made.save_pretrained(tmp_path / "peft")
    assert (
        run(
            [
                "--adapter_path",
                str(tmp_path / "peft"),
                "--text_format=output",
                "--prompt=ab",
                "--precision=fp32",
            ]
        )
        == 0
    )
    assert "Answer: " in capsys.readouterr().out
    argv = flags(
        tmp_path / "out", adapter_path=tmp_path / "peft", model_name_or_path=None, max_steps=1
    )
    assert run(argv) == 0, (
        capsys.readouterr().err
    )  # GPT-2's 50,257 tokens would not fit this model's 257
    assert modify_llm.read_json(tmp_path / "out" / "run.json")["settings"]["lora_rank"] == 3
    assert "trained with 3" in refused([*argv, "--lora_rank=5", "--overwrite_output_dir"], capsys)


def test_a_base_from_scratch_is_saved_beside_the_result_and_both_can_move(
    flags, tmp_path, small_base, rows, capsys
):
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
    }
    argv = flags(
        tmp_path / "out", model_name_or_path=None, from_scratch="true", vocab_size=257, max_steps=3, **sizes,
        tokenizer_name_or_path=small_base,
    )  # fmt: skip
    assert run(argv) == 0
    assert capsys.readouterr().out.count("RANDOM WEIGHTS") == 1
    (tmp_path / "out").rename(tmp_path / "moved")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "moved" / "base")
    assert (base.config.n_embd, base.config.n_layer, base.config.vocab_size) == (24, 1, 257)
    model = modify_llm.load_trained(tmp_path / "moved" / "final")
    tokenizer = data_pipeline.load_tokenizer(str(tmp_path / "moved" / "final"))
    dataset = data_pipeline.load_dataset(rows, tokenizer, text_format=FORMAT, max_length=96)
    held_out, losses = dataset.split(0.2, 42)[1], held_out_losses(tmp_path / "moved")
    assert plain_loss(model, held_out)[0] == pytest.approx(losses[3], rel=1e-6)
    assert plain_loss(base, held_out)[0] == pytest.approx(losses[0], rel=1e-6)
