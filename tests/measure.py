"""Measurements for the README: learning rates, and what each technique learns, costs and saves.

    python tests/measure.py sweep --dataset_path alpaca_data.json --model_name_or_path distilgpt2
    python tests/measure.py results --dataset_path alpaca_data.json --plot chart.png
    python tests/measure.py results --demo
    python tests/measure.py peft --dataset_path alpaca_data.json --max_samples 6000

`sweep`: the held-out loss at several learning rates. `results`: perplexity, answers, parameters,
size and time of each technique (pip install sacrebleu). `peft`: PEFT's LoRA beside ours (pip
install peft accelerate).

Every figure is of a run of train_llm.py: one pass over `--max_samples` rows, for `results` with
their prompts, else response texts alone, evaluated on held-out rows. Each run's result is kept in
--work_dir with its flags, so that an interrupted measurement goes on where it was.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, GPT2LMHeadModel, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data_pipeline
import modify_llm
import train_llm

TECHNIQUES = {
    "full": ["--modification_type", "full"],
    "selective, lower half frozen": ["--modification_type", "selective"],
    "LoRA r=4, all layers": ["--modification_type", "lora"],
    "LoRA r=4, query and value": ["--lora_target_modules", "c_attn.q,c_attn.v"],
    "DoRA r=4, all layers": ["--lora_dora"],
    "adapters 64, houlsby": ["--modification_type", "adapter", "--adapter_placement", "houlsby"],
    "adapters 64, pfeiffer": ["--modification_type", "adapter"],
    "prefix 50, key_value": ["--modification_type", "prefix", "--prefix_type", "key_value"],
    "prefix 50, embedding": ["--modification_type", "prefix"],
    "IA3": ["--modification_type", "ia3"],
    "biases alone (BitFit)": ["--modification_type", "bitfit"],
    "LayerNorms alone": ["--modification_type", "layernorm"],
}
ANSWERS = 100  # held-out prompts, answered greedily and scored after the last step
RATES = {  # from published practice, for pretrained models, to what a weak base likes
    "full": (5e-5, 2e-4, 5e-4, 1e-3, 2e-3),
    "selective, lower half frozen": (5e-5, 2e-4, 5e-4, 1e-3, 2e-3),
    "LoRA r=4, all layers": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    "adapters 64, pfeiffer": (1e-4, 5e-4, 2e-3, 5e-3, 1e-2),
    "prefix 50, key_value": (5e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "prefix 50, embedding": (5e-3, 1e-2, 3e-2, 1e-1),
    "IA3": (3e-3, 1e-2, 3e-2, 1e-1),
    "biases alone (BitFit)": (1e-3, 3e-3, 1e-2, 3e-2),
    "LayerNorms alone": (1e-3, 3e-3, 1e-2, 3e-2),
}
# For a small and weakly trained GPT-2: near the sweep's best, lower where a pass is much longer
WEAK_RATES = {
    "full": 5e-4, "selective, lower half frozen": 1e-3, "LoRA r=4, all layers": 5e-3,
    "LoRA r=4, query and value": 5e-3, "DoRA r=4, all layers": 5e-3, "adapters 64, houlsby": 5e-3,
    "adapters 64, pfeiffer": 5e-3, "prefix 50, key_value": 1e-1, "prefix 50, embedding": 1e-2,
    "IA3": 3e-2, "biases alone (BitFit)": 1e-2, "LayerNorms alone": 1e-2,
}  # fmt: skip
# The demo's rows are short and few: ten passes. Its base has room for a prefix of 8.
DEMO_RUNTIME = ["--device=cpu", "--precision=fp32"]
DEMO_RUN = ["--text_format", train_llm.DEMO_FORMAT, "--max_length=32", "--epochs=10"]
DEMO_RUN += ["--batch_size=32", "--prefix_length=8"]
# Some ten times the defaults, which so small a base likes; not tuned
DEMO_RATES = {
    "full": 1e-3, "selective, lower half frozen": 1e-3, "prefix 50, key_value": 3e-1,
    "prefix 50, embedding": 1e-1, "IA3": 1e-1, "biases alone (BitFit)": 3e-2,
    "LayerNorms alone": 3e-2,
}  # fmt: skip


def read_rates(text: str) -> dict[str, float]:
    """--rates: those of a weak base, or JSON."""
    return WEAK_RATES if text == "weak" else json.loads(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """All flags of train_llm.py, as its command line gives them."""
    return train_llm.resolve(vars(train_llm.build_parser().parse_args(argv)))


def run_flags(args: argparse.Namespace) -> list[str]:
    """What all runs have in common."""
    flags = [f"--dataset_path={args.dataset_path}", f"--max_samples={args.max_samples}"]
    flags += [f"--max_eval_samples={args.max_eval_samples}"]
    flags += [f"--model_name_or_path={args.model_name_or_path}", "--epochs=1"]
    flags += ["--num_samples=0", "--log_interval=100"]
    answers = ["--text_format=alpaca", f"--eval_answers={ANSWERS}"]
    flags += answers if args.what == "results" and not args.demo else ["--text_format=output"]
    if args.eval_dataset_path:
        flags += [f"--eval_dataset_path={args.eval_dataset_path}"]
    flags += [*DEMO_RUNTIME, *DEMO_RUN] if args.demo else []
    return [*flags, "--overwrite_output_dir"]


def train(args: argparse.Namespace, name: str, *flags: str) -> dict:
    """One run of train_llm.py, or what the same flags left in the work directory."""
    directory = args.work_dir / name.replace(" ", "_").replace(",", "").replace("=", "")
    summary, flags = directory / "summary.json", [*run_flags(args), *flags]
    if found := kept(summary, flags):
        return found
    command = [sys.executable, str(ROOT / "train_llm.py"), *flags, f"--output_dir={directory}"]
    before = cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    seconds = cpu_seconds() - before
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    saved = [file for file in (directory / "final").iterdir() if file.name not in tokenizer]
    result = json.loads((directory / "run.json").read_text())["parameters"]  # total, trainable
    result |= {"flags": flags, "before": losses[0], "after": losses[-1], "seconds": seconds}
    result["accuracy"] = [row["eval_accuracy"] for row in rows if "eval_loss" in row][-1]
    result |= next((row for row in reversed(rows) if "eval_chrf" in row), {})
    result["saved_mb"] = sum(file.stat().st_size for file in saved) / 1e6
    summary.write_text(json.dumps(result))
    return result


def kept(summary: Path, flags: list[str]) -> dict:
    """The result of an earlier run with the same flags; {} where there is none."""
    result = json.loads(summary.read_text()) if summary.exists() else {}
    return result if result.get("flags") == flags else {}


def cpu_seconds() -> float:
    """Of the runs so far: what they would take on one idle core, whatever else the machine does."""
    times = os.times()
    return times.children_user + times.children_system


def technique_flags(name: str, model: str) -> list[str]:
    """The flags of a technique; "lower half frozen" is of whatever model this is."""
    if "half" not in name:
        return TECHNIQUES[name]
    config = modify_llm.read_config(modify_llm.with_defaults(model_name_or_path=model))
    return [*TECHNIQUES[name], f"--freeze_layers=0-{config.n_layer // 2 - 1}"]


def sweep(args: argparse.Namespace) -> None:
    """Held-out loss after one pass: a row a technique, a cell a learning rate, the best in bold."""
    for name, rates in RATES.items():
        if args.only not in name:
            continue
        flags, losses = technique_flags(name, args.model_name_or_path), {}
        for rate in rates:
            run = train(args, f"sweep {name} {rate:g}", *flags, f"--learning_rate={rate}")
            losses[rate] = run["after"]
        best = min(losses, key=losses.get)
        cells = {rate: f"{loss:.3f}" for rate, loss in losses.items()}
        cells[best] = f"**{cells[best]}**"
        row = " | ".join(f"{loss} ({rate:g})" for rate, loss in cells.items())
        print(f"| {name} | {row} |", flush=True)


def results(args: argparse.Namespace) -> None:
    """What each technique trains, learns, saves and costs, a row each: means over the seeds."""
    columns = "trainable | share | held-out perplexity before | after | tokens right | saved"
    # the time of a table to repeat to the digit is not one of its digits
    columns += "" if args.demo else " | chrF | BLEU | tokens | stop | CPU time"
    print(f"| technique | {columns} |\n| --- {'| ---: ' * (columns.count('|') + 1)}|", flush=True)
    rows, rates = [], args.rates
    if args.demo:
        rates = {name: DEMO_RATES.get(name, 1e-2) for name in TECHNIQUES} | rates
    for name in TECHNIQUES:
        if args.only not in name:
            continue
        rate = [f"--learning_rate={rates[name]}"] if name in rates else []
        flags = [*technique_flags(name, args.model_name_or_path), *rate]
        runs = [train(args, f"results {name}", *flags)]
        for seed in range(1, args.seeds):
            runs.append(train(args, f"results {name} {seed}", *flags, f"--seed={42 + seed}"))
        row = runs[0]
        rows.append(row | {"label": name})
        after = [math.exp(run["after"]) for run in runs]
        spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
        counts = f"{row['trainable']:,} | {row['trainable'] / row['total']:.2%}"
        perplexity = f"{math.exp(row['before']):.1f} | {statistics.mean(after):.2f}{spread}"
        perplexity += f" | {statistics.mean(run['accuracy'] for run in runs):.1%}"
        saved = row["saved_mb"]
        cost = f"{saved:.1f} MB" if saved >= 1 else f"{1000 * saved:.1f} kB"
        if not args.demo:
            keys = ("eval_chrf", "eval_bleu", "eval_answer_length", "eval_stopped", "seconds")
            means = {key: statistics.mean(run[key] for run in runs) for key in keys}
            figures = (
                "{eval_chrf:.1f} | {eval_bleu:.1f} | {eval_answer_length:.0f} | {eval_stopped:.0%}"
            )
            cost += f" | {figures.format(**means)} | {means['seconds'] / 60:.1f} min"
        label = name.replace("prefix 50", "prefix 8") if args.demo else name
        print(f"| {label} | {counts} | {perplexity} | {cost} |", flush=True)
    if args.plot:
        plot(rows, args)


def use_demo(args: argparse.Namespace) -> None:
    """Sets the demo's base, trained here if it is not yet, and the bundled sample; one thread."""
    directory = args.work_dir / "demo"
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if not (directory / "final").exists():
        command = [sys.executable, str(ROOT / "train_llm.py"), "--demo", *DEMO_RUNTIME]
        subprocess.run([*command, f"--output_dir={directory}"], check=True, stdout=sys.stderr)
    lora = train_llm.DEMO_LORA
    args.dataset_path, args.eval_dataset_path = lora["dataset_path"], lora["eval_dataset_path"]
    args.model_name_or_path = str(directory / "base")


def missing_packages(*names: str) -> str:
    """The command that installs those that are not there; "" where all are."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    return f"pip install {' '.join(missing)}" if missing else ""


def peft_parts(model_path: str, dropout: float = 0.0) -> tuple[GPT2LMHeadModel, Any]:
    """(the base with GPT-2's dropouts set, PEFT's LoRA as ours is by default)"""
    from peft import LoraConfig

    base = GPT2LMHeadModel.from_pretrained(
        model_path, attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout
    )
    layers = ["c_attn", "c_proj", "c_fc"]
    return base, LoraConfig(
        r=4, lora_alpha=8, target_modules=layers, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )


def default_runtime() -> train_llm.Runtime:
    """The device and the precision that train_llm.py takes here."""
    return train_llm.choose_runtime(argparse.Namespace(device="auto", precision="auto"))


def trainer_settings(output_dir: str) -> dict[str, Any]:
    """Of Hugging Face's Trainer and TRL's: nothing saved or reported, our device and precision."""
    settings = {"output_dir": output_dir, "save_strategy": "no", "report_to": []}
    settings |= {"logging_steps": 10_000, "disable_tqdm": True}
    runtime = default_runtime()
    settings |= {"use_cpu": runtime.device.type == "cpu"}
    return settings | {"bf16": runtime.dtype == torch.bfloat16}


def peft_trainer(
    model_path: str, rows: data_pipeline.AlpacaDataset, dropout: float = 0.0, **settings: Any
) -> Trainer:
    """Hugging Face's Trainer with PEFT's LoRA, in batches of 8 rows padded to their longest."""
    from peft import get_peft_model

    model = get_peft_model(*peft_parts(model_path, dropout))
    data = [{name: ids.tolist() for name, ids in row.items()} for row in rows]
    collate = DataCollatorForSeq2Seq(data_pipeline.load_tokenizer())  # labels padded with -100
    settings = TrainingArguments(per_device_train_batch_size=8, **settings)
    return Trainer(model=model, args=settings, train_dataset=data, data_collator=collate)


def beside_peft(args: argparse.Namespace) -> None:
    """Held-out perplexity of our LoRA and PEFT's over three seeds: same batches, same settings."""
    if command := missing_packages("peft", "accelerate"):
        sys.exit(f"measure.py peft: packages are missing: {command}")
    print("| seed | ours | PEFT |\n| ---: | ---: | ---: |")
    for seed in range(3):
        ours = train(args, f"peft ours {seed}", f"--seed={seed}")["after"]
        summary, flags = args.work_dir / f"peft_theirs_{seed}.json", run_flags(args)
        if not (found := kept(summary, flags)):
            found = {"flags": flags, "after": peft_loss(args, seed)}
            summary.write_text(json.dumps(found))
        theirs = found["after"]
        print(f"| {seed} | {math.exp(ours):.2f} | {math.exp(theirs):.2f} |", flush=True)


def peft_loss(args: argparse.Namespace, seed: int) -> float:
    """The held-out loss of PEFT's LoRA after Trainer, by the same evaluation as ours."""
    flags = parse([*run_flags(args), f"--seed={seed}"])
    runtime, tokenizer = train_llm.choose_runtime(flags), train_llm.tokenizer_for(flags)
    rows, held_out = train_llm.load_rows(flags, tokenizer)
    loader = train_llm.make_loader(rows, flags, runtime, tokenizer)
    torch.manual_seed(seed)
    trainer = peft_trainer(
        modify_llm.locate(args.model_name_or_path), rows, num_train_epochs=1, seed=seed,
        learning_rate=flags.learning_rate, weight_decay=flags.weight_decay,
        lr_scheduler_type="cosine", warmup_steps=min(100, len(loader) // 10),
        **trainer_settings(str(args.work_dir / "peft")),
    )  # fmt: skip
    trainer.get_train_dataloader = lambda: loader  # Trainer's order, long to short, learns less
    trainer.train()
    loader = train_llm.make_loader(held_out, flags, runtime, tokenizer, shuffle=False)
    summed_loss = train_llm.SummedLoss(trainer.model.base_model.model)
    return train_llm.evaluate(summed_loss, loader, runtime)[0]


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
            after = math.exp(row["after"])
            axes.plot(row["trainable"], after, "o", markersize=9, label=row["label"])
    axes.set(xscale="log", xlabel="trainable parameters")
    axes.set(yscale="log", ylabel="held-out perplexity after one epoch")
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
    parser.add_argument("--dataset_path", help="needed without --demo")
    demo = "results: on the demo's base and rows, fp32 on one thread: the same digits each time"
    parser.add_argument("--demo", action="store_true", help=demo)
    parser.add_argument("--seeds", type=int, default=1, help="results: runs of each technique")
    parser.add_argument("--eval_dataset_path", default="")
    parser.add_argument("--model_name_or_path", default="distilgpt2")
    parser.add_argument("--max_samples", type=int, default=30_000)
    parser.add_argument("--max_eval_samples", type=int, default=1_000)
    parser.add_argument("--only", default="", help="techniques whose name holds this (all)")
    rates = "results: rates other than the defaults, as JSON {technique: rate}, or `weak`"
    parser.add_argument("--rates", type=read_rates, default={}, help=rates)
    parser.add_argument("--plot", default="")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/measure"))
    args = parser.parse_args()
    if not (args.demo or args.dataset_path) or (args.demo and args.what != "results"):
        parser.error("--dataset_path: needed; --demo: for results only")
    if args.what == "results" and not args.demo and (command := missing_packages("sacrebleu")):
        parser.error(f"results: a package is missing: {command}")
    if args.plot and args.only:
        parser.error("--plot: draws all techniques, without --only")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.demo:
        use_demo(args)
    {"sweep": sweep, "results": results, "peft": beside_peft}[args.what](args)


if __name__ == "__main__":
    main()
