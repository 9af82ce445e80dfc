"""Measurements for the README: learning rates, and what each technique learns, costs and saves.

    python tests/measure.py sweep --dataset_path alpaca_data.json --model_name_or_path distilgpt2
    python tests/measure.py results --dataset_path alpaca_data.json --model_name_or_path distilgpt2 --plot chart.png
    python tests/measure.py results ... --peft_seeds 3        # PEFT's LoRA beside ours (needs tests/requirements.txt)

Every row is a run of train_llm.py of its own: one pass over `--max_samples` rows of response texts, evaluated on
held-out rows. Each run's result is kept in --work_dir, so that an interrupted measurement goes on where it was.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
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


def train(args: argparse.Namespace, name: str, *flags: str) -> dict:
    """One run of train_llm.py, or what an earlier one left in the work directory."""
    directory = args.work_dir / name.replace(" ", "_").replace(",", "").replace("=", "")
    summary = directory / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    command = [sys.executable, str(ROOT / "train_llm.py"), "--dataset_path", args.dataset_path, "--epochs", "1"]
    command += ["--model_name_or_path", args.model_name_or_path, "--text_format", "output", "--overwrite_output_dir"]
    command += ["--max_samples", str(args.max_samples), "--max_eval_samples", str(args.max_eval_samples)]
    command += ["--num_samples", "0", "--log_interval", "100", "--output_dir", str(directory), *flags]
    if args.eval_dataset_path:
        command += ["--eval_dataset_path", args.eval_dataset_path]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    counts = json.loads((directory / "run.json").read_text())["parameters"]
    skip = ("tokenizer.json", "tokenizer_config.json")
    size = sum(file.stat().st_size for file in (directory / "final").iterdir() if file.name not in skip)
    result = {"name": name, "before": losses[0], "after": losses[-1], "seconds": time.perf_counter() - start}
    result |= {"trainable": counts["trainable"], "total": counts["total"], "saved_mb": size / 1e6}
    summary.write_text(json.dumps(result))
    return result


def half_frozen(args: argparse.Namespace, name: str) -> list[str]:
    """--freeze_layers for the lower half of whatever model this is."""
    if not name.startswith("selective"):
        return []
    sys.path.insert(0, str(ROOT))
    import modify_llm

    flags = modify_llm.with_defaults(None, model_name_or_path=args.model_name_or_path)
    return ["--freeze_layers", f"0-{modify_llm.read_config(flags).n_layer // 2 - 1}"]


def sweep(args: argparse.Namespace) -> None:
    """Held-out loss after one pass, a row a technique, a column a learning rate; the best in bold."""
    for name, rates in RATES.items():
        if args.only and args.only not in name:
            continue
        flags = TECHNIQUES[name] + half_frozen(args, name)
        losses = {r: train(args, f"sweep {name} {r:g}", *flags, "--learning_rate", str(r))["after"] for r in rates}
        best = min(losses.values())
        cells = [
            f"**{loss:.3f}** ({rate:g})" if loss == best else f"{loss:.3f} ({rate:g})" for rate, loss in losses.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def results(args: argparse.Namespace) -> None:
    rows = []
    print(
        "| technique | trainable | share | held-out perplexity before | after | saved | time |\n"
        + "| --- "
        + "| ---: " * 6
        + "|"
    )
    for name, flags in TECHNIQUES.items():
        row = train(args, f"results {name}", *flags, *half_frozen(args, name))
        rows.append(row | {"label": name})
        before, after = math.exp(row["before"]), math.exp(row["after"])
        counts = f"{row['trainable']:,} | {row['trainable'] / row['total']:.2%}"
        saved = f"{row['saved_mb']:.1f} MB | {row['seconds'] / 60:.1f} min"
        print(f"| {name} | {counts} | {before:.1f} | {after:.2f} | {saved} |", flush=True)
    for seed in range(args.peft_seeds):
        ours = train(args, f"peft ours {seed}", "--learning_rate", str(args.peft_learning_rate), "--seed", str(seed),
                     "--warmup_steps", "100")  # fmt: skip
        theirs = peft_lora(args, seed)
        print(
            f"| LoRA, seed {seed}: ours {math.exp(ours['after']):.2f}, PEFT {math.exp(theirs['after']):.2f} |",
            flush=True,
        )
    if args.plot:
        plot(rows, args)


def peft_lora(args: argparse.Namespace, seed: int) -> dict:
    """Hugging Face Trainer + PEFT with the same rows, hyperparameters and evaluation."""
    summary = args.work_dir / f"peft_theirs_{seed}.json"
    if summary.exists():
        return json.loads(summary.read_text())
    sys.path.insert(0, str(ROOT))
    import peft
    import torch
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

    import data_pipeline
    import modify_llm
    import train_llm

    tokenizer = data_pipeline.load_tokenizer()
    flags = ["--dataset_path", args.dataset_path, "--text_format", "output", "--max_samples", str(args.max_samples)]
    flags += ["--max_eval_samples", str(args.max_eval_samples)]
    flags += ["--eval_dataset_path", args.eval_dataset_path] if args.eval_dataset_path else []
    runtime = train_llm.choose_runtime(train_llm.parse(flags))
    rows, held_out = train_llm.load_rows(train_llm.parse([*flags, "--seed", str(seed)]), tokenizer)
    path = modify_llm.locate(args.model_name_or_path)
    base = GPT2LMHeadModel.from_pretrained(path, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    torch.manual_seed(seed)
    targets = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    collate = data_pipeline.PadBatch(tokenizer.pad_token_id, None)
    settings = TrainingArguments(
        output_dir=str(args.work_dir / "peft"), per_device_train_batch_size=8, num_train_epochs=1, save_strategy="no",
        learning_rate=args.peft_learning_rate, weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=100,
        seed=seed, bf16=runtime.dtype == torch.bfloat16, report_to=[], disable_tqdm=True, logging_steps=10_000,
        train_sampling_strategy="group_by_length", remove_unused_columns=False,
    )  # fmt: skip
    data = [dict(rows[i], length=int(n)) for i, n in enumerate(rows.lengths)]
    start = time.perf_counter()
    Trainer(model=model, args=settings, train_dataset=data, data_collator=collate).train()
    seconds = time.perf_counter() - start
    runtime = train_llm.choose_runtime(train_llm.parse([*flags, "--precision", "fp32"]))
    loader = data_pipeline.final_dataset_loader(
        held_out, tokenizer=tokenizer, padding="longest", group_by_length=True, shuffle=False
    )
    loss, _ = train_llm.evaluate(train_llm.SummedLoss(model.base_model.model), loader, runtime)
    summary.write_text(json.dumps({"after": loss, "seconds": seconds}))
    return {"after": loss, "seconds": seconds}


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
            axes.plot(row["trainable"], math.exp(row["after"]), "o", color="#4c72b0", markersize=8)
            axes.annotate(row["label"], (row["trainable"], math.exp(row["after"])), (6, 6), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="held-out perplexity after one epoch")
    axes.set_title(f"{Path(args.model_name_or_path).name}, {args.max_samples:,} rows")
    axes.legend()
    figure.savefig(args.plot, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "results"))
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--eval_dataset_path", default="")
    parser.add_argument("--model_name_or_path", default="distilgpt2")
    parser.add_argument("--max_samples", type=int, default=30_000)
    parser.add_argument("--max_eval_samples", type=int, default=1_000)
    parser.add_argument("--only", default="", help="sweep: techniques whose name holds this")
    parser.add_argument("--peft_seeds", type=int, default=0)
    parser.add_argument("--peft_learning_rate", type=float, default=5e-3)
    parser.add_argument("--plot", default="")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/measure"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    {"sweep": sweep, "results": results}[args.what](args)


if __name__ == "__main__":
    main()
