"""Measurements for the README: learning rates, and what each technique learns, costs and saves.

    python tests/measure.py sweep --dataset_path alpaca_data.json --model_name_or_path distilgpt2
    python tests/measure.py results --dataset_path alpaca_data.json --model_name_or_path distilgpt2 --plot chart.png
    python tests/measure.py peft --max_samples 6000 ...        # PEFT's LoRA beside ours; pip install peft accelerate

Every row is a run of train_llm.py of its own: one pass over `--max_samples` rows of response texts, evaluated on
held-out rows. Each run's result is kept in --work_dir, so that an interrupted measurement goes on where it was.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data_pipeline  # noqa: E402
import modify_llm  # noqa: E402
import train_llm  # noqa: E402

LAYERS = ["c_attn", "c_proj", "c_fc"]
TECHNIQUES = {
    "full": ["--modification_type", "full"],
    "selective, lower half frozen": ["--modification_type", "selective"],
    "LoRA r=4, all layers": ["--modification_type", "lora"],
    "adapters 64, houlsby": ["--modification_type", "adapter", "--adapter_placement", "houlsby"],
    "adapters 64, pfeiffer": ["--modification_type", "adapter"],
    "prefix 50, key_value": ["--modification_type", "prefix", "--prefix_type", "key_value"],
    "prefix 50, embedding": ["--modification_type", "prefix"],
}
RATES = {
    "full": (5e-4, 1e-3, 2e-3),
    "selective, lower half frozen": (5e-4, 1e-3, 2e-3),
    "LoRA r=4, all layers": (1e-3, 2e-3, 5e-3, 1e-2),
    "adapters 64, pfeiffer": (2e-3, 5e-3, 1e-2),
    "prefix 50, key_value": (1e-2, 3e-2, 1e-1, 3e-1),
    "prefix 50, embedding": (1e-2, 3e-2, 1e-1),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """All flags of train_llm.py, as its command line gives them."""
    return train_llm.resolve(vars(train_llm.build_parser().parse_args(argv)))


def run_flags(args: argparse.Namespace) -> list[str]:
    """What all runs have in common."""
    flags = [
        "--dataset_path",
        args.dataset_path,
        "--model_name_or_path",
        args.model_name_or_path,
        "--epochs",
        "1",
    ]
    flags += [
        "--max_samples",
        str(args.max_samples),
        "--max_eval_samples",
        str(args.max_eval_samples),
    ]
    flags += [
        "--text_format",
        "output",
        "--num_samples",
        "0",
        "--log_interval",
        "100",
        "--overwrite_output_dir",
    ]
    return flags + (
        ["--eval_dataset_path", args.eval_dataset_path] if args.eval_dataset_path else []
    )


def train(args: argparse.Namespace, name: str, *flags: str) -> dict:
    """One run of train_llm.py, or what an earlier one left in the work directory."""
    directory = args.work_dir / name.replace(" ", "_").replace(",", "").replace("=", "")
    summary = directory / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    command = [
        sys.executable,
        str(ROOT / "train_llm.py"),
        *run_flags(args),
        "--output_dir",
        str(directory),
        *flags,
    ]
    before = cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    counts = json.loads((directory / "run.json").read_text())["parameters"]
    skip = ("tokenizer.json", "tokenizer_config.json")
    size = sum(
        file.stat().st_size for file in (directory / "final").iterdir() if file.name not in skip
    )
    result = {
        "name": name,
        "before": losses[0],
        "after": losses[-1],
        "seconds": cpu_seconds() - before,
    }
    result |= {"trainable": counts["trainable"], "total": counts["total"], "saved_mb": size / 1e6}
    summary.write_text(json.dumps(result))
    return result


def cpu_seconds() -> float:
    """Of the runs so far: what they would take on one idle core, whatever else the machine was doing."""
    times = os.times()
    return times.children_user + times.children_system


def technique_flags(name: str, model: str) -> list[str]:
    """The flags of a technique; "lower half frozen" is of whatever model this is."""
    if "half" not in name:
        return TECHNIQUES[name]
    args = modify_llm.with_defaults(None, model_name_or_path=model)
    return [
        *TECHNIQUES[name],
        "--freeze_layers",
        f"0-{modify_llm.read_config(args).n_layer // 2 - 1}",
    ]


def sweep(args: argparse.Namespace) -> None:
    """Held-out loss after one pass, a row a technique, a column a learning rate; the best in bold."""
    for name, rates in RATES.items():
        if args.only and args.only not in name:
            continue
        flags = technique_flags(name, args.model_name_or_path)
        losses = {
            r: train(args, f"sweep {name} {r:g}", *flags, "--learning_rate", str(r))["after"]
            for r in rates
        }
        best = min(losses.values())
        cells = [
            f"**{loss:.3f}** ({rate:g})" if loss == best else f"{loss:.3f} ({rate:g})"
            for rate, loss in losses.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def results(args: argparse.Namespace) -> None:
    rows = []
    print(
        "| technique | trainable | share | held-out perplexity before | after | saved | CPU time |\n"
        + "| --- "
        + "| ---: " * 6
        + "|"
    )
    for name in TECHNIQUES:
        row = train(args, f"results {name}", *technique_flags(name, args.model_name_or_path))
        rows.append(row | {"label": name})
        before, after = math.exp(row["before"]), math.exp(row["after"])
        counts = f"{row['trainable']:,} | {row['trainable'] / row['total']:.2%}"
        saved = f"{row['saved_mb']:.1f} MB | {row['seconds'] / 60:.1f} min"
        print(f"| {name} | {counts} | {before:.1f} | {after:.2f} | {saved} |", flush=True)
    if args.plot:
        plot(rows, args)


def train_with_peft(
    model_path: str, rows: data_pipeline.AlpacaDataset, output_dir: Path, dropout: float = 0.0,
    loader: DataLoader | None = None, **settings: Any,
) -> nn.Module:  # fmt: skip
    """Hugging Face's Trainer with PEFT's LoRA: one pass over the rows, in its own batches or the loader's."""
    import peft

    base = GPT2LMHeadModel.from_pretrained(
        model_path, attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=LAYERS, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    arguments = TrainingArguments(
        output_dir=str(output_dir), per_device_train_batch_size=8, num_train_epochs=1,
        use_cpu=not torch.cuda.is_available(), report_to=[], logging_steps=10_000, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, **settings,
    )  # fmt: skip
    data = [dict(rows[i], length=int(n)) for i, n in enumerate(rows.lengths)]
    collate = data_pipeline.PadBatch(data_pipeline.load_tokenizer().pad_token_id, None)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    if loader:
        trainer.get_train_dataloader = lambda: loader
    trainer.train()
    return model


def beside_peft(args: argparse.Namespace) -> None:
    """Held-out perplexity of our LoRA and PEFT's, same batches and hyperparameters, over three seeds."""
    print("| seed | ours | PEFT |\n| ---: | ---: | ---: |")
    for seed in range(3):
        ours = train(args, f"peft ours {seed}", "--seed", str(seed))
        summary = args.work_dir / f"peft_theirs_{seed}.json"
        if not summary.exists():
            summary.write_text(json.dumps({"after": peft_loss(args, seed)}))
        theirs = json.loads(summary.read_text())
        print(
            f"| {seed} | {math.exp(ours['after']):.2f} | {math.exp(theirs['after']):.2f} |",
            flush=True,
        )


def peft_loss(args: argparse.Namespace, seed: int) -> float:
    """The held-out loss of PEFT's LoRA after Hugging Face's Trainer, by the same evaluation as ours."""
    flags = parse([*run_flags(args), "--seed", str(seed)])
    runtime, tokenizer = train_llm.choose_runtime(flags), data_pipeline.load_tokenizer()
    rows, held_out = train_llm.load_rows(flags, tokenizer)
    set_seed(seed)
    grouped = {
        "tokenizer": tokenizer,
        "padding": "longest",
        "group_by_length": True,
        "num_workers": 0,
        "seed": seed,
    }
    loader = data_pipeline.final_dataset_loader(
        rows, **grouped
    )  # Trainer's own order, long to short, learns less
    model = train_with_peft(
        modify_llm.locate(args.model_name_or_path), rows, args.work_dir / "peft", loader=loader, seed=seed,
        learning_rate=flags.learning_rate, weight_decay=flags.weight_decay, lr_scheduler_type="cosine",
        warmup_steps=min(100, len(rows) // 80), bf16=runtime.dtype == torch.bfloat16,
    )  # fmt: skip
    loader = data_pipeline.final_dataset_loader(held_out, shuffle=False, **grouped)
    return train_llm.evaluate(train_llm.SummedLoss(model.base_model.model), loader, runtime)[0]


def plot(rows: list[dict], args: argparse.Namespace) -> None:
    """Held-out perplexity against trainable parameters; the base and full fine-tuning as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    full = next(row for row in rows if row["label"] == "full")
    axes.axhline(math.exp(full["before"]), color="#888888", linestyle=":", label="base, untouched")
    axes.axhline(math.exp(full["after"]), color="#c44e52", linestyle="--", label="full fine-tuning")
    for row in rows:
        if row is not full:
            axes.plot(
                row["trainable"], math.exp(row["after"]), "o", markersize=9, label=row["label"]
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="trainable parameters",
        ylabel="held-out perplexity after one epoch",
    )
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_title(f"{Path(args.model_name_or_path).name}, {args.max_samples:,} rows")
    figure.legend(loc="outside right upper")
    figure.savefig(args.plot, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sweep", "results", "peft"))
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--eval_dataset_path", default="")
    parser.add_argument("--model_name_or_path", default="distilgpt2")
    parser.add_argument("--max_samples", type=int, default=30_000)
    parser.add_argument("--max_eval_samples", type=int, default=1_000)
    parser.add_argument("--only", default="", help="sweep: techniques whose name holds this")
    parser.add_argument("--plot", default="")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/measure"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    {"sweep": sweep, "results": results, "peft": beside_peft}[args.what](args)


if __name__ == "__main__":
    main()
