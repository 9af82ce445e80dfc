"""PEFT's LoRA in Hugging Face's Trainer beside ours: the same batches, the same hyperparameters.

    python tests/measure.py --dataset_path alpaca_data.json --max_samples 2000

One pass over response texts for each of three seeds, and the perplexity of the same held-out rows,
by the same evaluation. Finished runs stay in --work_dir and are not run again, so an interrupted
measurement goes on where it was. Needs: pip install peft accelerate

What our own techniques learn, cost and save beside one another: python train_llm.py --compare
"""

import argparse
import importlib.util
import json
import math
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


def parse(flags: list[str]) -> argparse.Namespace:
    """All flags of train_llm.py, as its command line gives them."""
    return train_llm.resolve(train_llm.parse_flags(flags))


def run_flags(args: argparse.Namespace, seed: int) -> list[str]:
    """Those of train_llm.py that both libraries share."""
    names = ("dataset_path", "eval_dataset_path", "model_name_or_path")
    names += ("max_samples", "max_eval_samples")
    flags = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name)]
    return [*flags, f"--seed={seed}", "--epochs=1", "--text_format=output", "--num_samples=0"]


def ours(args: argparse.Namespace, seed: int) -> float:
    """The held-out loss of our LoRA after its run."""
    directory = args.work_dir / f"ours_{seed}"
    flags = [*run_flags(args, seed), f"--output_dir={directory}"]
    flags += ["--resume_from=auto"] if (directory / "run.json").exists() else []
    done = subprocess.run(
        [sys.executable, ROOT / "train_llm.py", *flags], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    rows = map(json.loads, (directory / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["eval_loss"] for row in rows if "eval_loss" in row][-1]


def theirs(args: argparse.Namespace, seed: int) -> float:
    """The held-out loss of PEFT's LoRA after Trainer, or what the same flags gave before."""
    path, flags = args.work_dir / f"peft_{seed}.json", run_flags(args, seed)
    if path.exists() and (kept := json.loads(path.read_text()))["flags"] == flags:
        return kept["loss"]
    loss = peft_loss(args, seed)
    path.write_text(json.dumps({"flags": flags, "loss": loss}))
    return loss


def peft_loss(args: argparse.Namespace, seed: int) -> float:
    """Trains PEFT's LoRA with our batches and settings, and evaluates it as we do."""
    flags = parse(run_flags(args, seed))
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


# ---- PEFT and Hugging Face's Trainer, also for benchmark.py --------------------------------------


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_path", required=True)
    parser.add_argument("--eval_dataset_path", default="")
    parser.add_argument("--model_name_or_path", default="distilgpt2")
    parser.add_argument("--max_samples", type=int, default=2_000)
    parser.add_argument("--max_eval_samples", type=int, default=500)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/measure"))
    args = parser.parse_args()
    if command := missing_packages("peft", "accelerate"):
        parser.error(f"packages are missing: {command}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    print("| seed | ours | PEFT |\n| ---: | ---: | ---: |")
    for seed in range(3):
        losses = ours(args, seed), theirs(args, seed)
        print("| {} | {:.2f} | {:.2f} |".format(seed, *map(math.exp, losses)), flush=True)


if __name__ == "__main__":
    main()
