"""Hu et al. (2021), table 3: GPT-2 medium on the E2E NLG challenge by LoRA, BLEU 70.4.

    pip install sacrebleu
    python tests/reproduce_e2e.py --model_name_or_path gpt2-medium --data_dir data/e2e

From the weights and microsoft/LoRA's examples/NLG/data/e2e (train.txt and test.txt, with valid.txt
also the held-out loss; lines of `context||completion`) to BLEU, with that code's settings: rows,
training, an answer by beam search to each context of test.txt, and BLEU against all of a context's
completions. What else stands on the command line goes to the training: `--resume_from auto` goes
on with one that was interrupted, `--learning_rate 1e-4` tries another rate.

What differs from that code: an epoch's last batch is shorter, where theirs is filled up with random
rows, and rows of like length meet in a batch; the schedule is one step ahead, so that no step has a
rate of 0; AdamW adds epsilon after the bias correction, as PyTorch does; a beam that has ended may
leave the search a step later; BLEU is sacrebleu's (13a's tokens, lower case, unsmoothed) where
theirs is e2e-metrics' mteval-v13a. Logged and held-out losses are without the label smoothing. Where
the paper and the code disagree, this is the code's: 393,216 parameters train (table 3: 0.35M), and
answers are ranked by score / length^0.8 (table 11: 0.9).
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from sacrebleu.metrics import BLEU

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_llm

# examples/NLG/README.md, "Replicating Our Result on E2E", step 1
TRAINING = {
    # gpt2_encode.py: the context, the end-of-text token, " completion", the end-of-text token
    "text_format": "{context}<|endoftext|>|| {completion}",
    "max_length": 512,
    "modification_type": "lora",
    "lora_rank": 4,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": "c_attn.q,c_attn.v",  # model.py: enable_lora=[True, False, True]
    "batch_size": 8,
    "epochs": 5,
    "learning_rate": 2e-4,
    "scheduler": "linear",
    "warmup_steps": 500,
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,  # optimizer.py's default
    "max_grad_norm": 0,
    "label_smoothing": 0.1,
    "seed": 110,
    "precision": "fp32",  # gpt2_ft.py without --fp16
    "save_interval": 1000,
    "log_interval": 100,
    "num_samples": 0,
}
# Step 2; it answers with the model of the last step
DECODING = {
    "num_beams": 10,
    "length_penalty": 0.8,
    "no_repeat_ngram_size": 4,
    "repetition_penalty": 1.0,
    "max_new_tokens": 64,
    "precision": "fp32",
}


def read_pairs(path: Path) -> list[dict[str, str]]:
    """The rows of a file of `context||completion` lines, as format_converting_e2e.py has them.

    Raises ValueError for a line that is none.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.strip().split("||")
            if len(parts) != 2 or not all(parts):
                raise ValueError(f"{path}, line {number}: {line!r} is not context||completion")
            rows.append({"context": parts[0], "completion": parts[1]})
    if not rows:
        raise ValueError(f"{path}: holds no lines")
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(settings: dict[str, object], *more: str) -> None:
    """train_llm.py; ends this script too where it fails or is stopped."""
    argv = [f"--{name}={value}" for name, value in settings.items()]
    if status := train_llm.main([*argv, *more]):
        sys.exit(status)


def first_paragraph(text: str) -> str:
    """What gpt2_decode.py scores of an answer or a completion."""
    return text.split("\n\n")[0].strip()


def bleu(answers: dict[str, str], pairs: list[dict[str, str]]) -> str:
    """BLEU of {context: answer} against all completions of each context, wherever they stand.

    As e2e-metrics' `measure_scores.py -p` computes it: mteval-v13a's tokens in lower case, the
    closest of the references' lengths, no smoothing.
    """
    references: dict[str, list[str]] = {context: [] for context in answers}
    for pair in pairs:
        references[pair["context"]].append(first_paragraph(pair["completion"]))
    # force: no warning that the texts are tokenised already, as E2E's are
    metric = BLEU(tokenize="13a", lowercase=True, smooth_method="none", force=True)
    streams = list(itertools.zip_longest(*references.values()))  # None where there are fewer
    score = metric.corpus_score([first_paragraph(a) for a in answers.values()], streams)
    return f"BLEU {score.score:.2f} on {len(answers)} contexts ({metric.get_signature()})"


def reproduce(args: argparse.Namespace, more: list[str]) -> str:
    """Trains, answers and scores: returns the line that says the score.

    Raises ValueError or OSError for data that is not there or not as it should be.
    """
    train, test = (read_pairs(args.data_dir / name) for name in ("train.txt", "test.txt"))
    valid = args.data_dir / "valid.txt"
    directory, run_dir = args.output_dir, args.output_dir / "run"
    directory.mkdir(parents=True, exist_ok=True)
    held_out: dict[str, object] = {"eval_fraction": 0}
    if valid.exists():
        held_out = {"eval_dataset_path": write_rows(directory / "valid.jsonl", read_pairs(valid))}
    rows = {"dataset_path": write_rows(directory / "train.jsonl", train)} | held_out
    places = {"model_name_or_path": args.model_name_or_path, "output_dir": run_dir}
    run(rows | places | TRAINING, *more)
    contexts = [{"context": text} for text in dict.fromkeys(pair["context"] for pair in test)]
    asked = write_rows(directory / "contexts.jsonl", contexts)
    run({"adapter_path": run_dir / "final", "prompts_file": asked} | DECODING)
    written = directory.glob("contexts.jsonl.*.answers.jsonl")
    newest = max(written, key=lambda path: path.stat().st_mtime)
    with open(newest, encoding="utf-8") as file:
        lines = zip(contexts, map(json.loads, file), strict=True)
        answers = {row["context"]: answered["answer"] for row, answered in lines}
    return bleu(answers, test)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/e2e"))
    args, more = parser.parse_known_args(argv)
    try:
        print(reproduce(args, more))
    except (ValueError, OSError) as error:
        print(f"reproduce_e2e.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
