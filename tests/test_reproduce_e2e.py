"""Claims about the published experiment: its rows, settings and score are the reference's. See reproduce_e2e.py."""

import math

import pytest

import data_pipeline

pytest.importorskip("sacrebleu")
import reproduce_e2e
from reproduce_e2e import bleu, read_pairs

# Made up, in the form of the challenge; a context stands in two places, as two do in test.txt.
LINES = [
    "name : Blue Spice | Type : pub | near : Crowne Plaza Hotel||Blue Spice is a pub near Crowne Plaza Hotel . ",
    "name : Zizzi | Type : coffee shop||Zizzi is a coffee shop . ",
    "name : Blue Spice | Type : pub | near : Crowne Plaza Hotel||The pub Blue Spice is by Crowne Plaza Hotel . ",
]


@pytest.fixture
def data_dir(tmp_path):
    directory = tmp_path / "e2e"
    directory.mkdir()
    (directory / "train.txt").write_text("\n".join(LINES[:2]) + "\n")
    (directory / "test.txt").write_text("\n".join(LINES) + "\n")
    return directory


def test_a_row_is_tokenised_as_in_the_reference(data_dir, tokenizer):
    """gpt2_encode.py --add_bos --add_eos and data_utils.py: loss on the completion and its end alone."""
    pairs = read_pairs(data_dir / "train.txt")
    reproduce_e2e.write_rows(data_dir / "train.jsonl", pairs)
    settings = {name: reproduce_e2e.TRAINING[name] for name in ("text_format", "max_length")}
    dataset = data_pipeline.load_dataset(data_dir / "train.jsonl", tokenizer, **settings)
    for row, line in zip(dataset, LINES, strict=False):
        context, completion = line.strip().split("||")
        prompt = [*tokenizer(context).input_ids, 50256]
        answer = [*tokenizer(" " + completion).input_ids, 50256]
        assert row["input_ids"].tolist() == prompt + answer
        assert row["labels"].tolist() == [-100] * len(prompt) + answer


def test_bleu_is_the_one_computed_by_hand(data_dir):
    """In lower case, to each answer the reference nearest in length, and only a first paragraph."""
    pairs = read_pairs(data_dir / "test.txt")
    answers = {
        pairs[0]["context"]: "blue spice is a pub by the Crowne Plaza Hotel .\n\nmore",
        pairs[1]["context"]: " A coffee shop .",
    }
    # 11 and 4 words, all in a reference; of the pairs, triples and fours in a row
    matched = 15 / 15 * (7 + 3) / (10 + 3) * (5 + 2) / (9 + 2) * (3 + 1) / (8 + 1)
    expected = 100 * math.exp(1 - (10 + 6) / (11 + 4)) * matched ** (1 / 4)
    assert bleu(answers, pairs).startswith(f"BLEU {expected:.2f} on 2 contexts")


@pytest.mark.parametrize("line", ["", "no separator", "one||two||three", "||no context"])
def test_a_line_that_is_none_is_named(data_dir, line, capsys):
    (data_dir / "test.txt").write_text(f"{LINES[0]}\n{line}\n")
    argv = ["--model_name_or_path=-", f"--data_dir={data_dir}", f"--output_dir={data_dir / 'out'}"]
    assert reproduce_e2e.main(argv) == 2
    assert "test.txt, line 2: " in capsys.readouterr().err
    assert not (data_dir / "out").exists()


def test_from_the_data_directory_to_bleu(data_dir, base_dir, tmp_path, capsys):
    """A model that has learnt its rows by heart answers them, and BLEU is 100. (Four tokens that no
    answer may hold twice, " Crowne Plaza Hotel", stand in its prompt: that does not count.)"""
    argv = ["--model_name_or_path", str(base_dir), "--data_dir", str(data_dir)]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_length=96", "--device=cpu"]
    heart = [
        "--modification_type=full",
        "--learning_rate=0.006",
        "--warmup_steps=10",
        "--epochs=120",
    ]
    assert reproduce_e2e.main([*argv, *heart]) == 0
    assert "BLEU 100.00 on 2 contexts" in capsys.readouterr().out
