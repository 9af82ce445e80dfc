"""How fast is training, in how much memory, and beside the libraries?

    python tests/benchmark.py                                   # ours, technique by technique
    python tests/benchmark.py --peers                           # LoRA beside Trainer + PEFT and TRL, run in turn
    python tests/benchmark.py --loading 30000,300000,1000000 --plot loading.png

Random weights of GPT-2 small serve (speed does not depend on them), or --model_name_or_path DIR. Each figure is a
difference of whole processes: one pass over all rows against one over the first 16 of them, start-up and the building
of kernels for the first shapes cancelled out; the memory is the operating system's peak of the longer one. The share
is of the matrix-product rate measured in the same minute. Peers need: pip install peft accelerate trl datasets
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import LAYERS, ROOT, TECHNIQUES, parse, technique_flags, train_with_peft
from transformers import GPT2Config, GPT2LMHeadModel

import data_pipeline  # importable since measure has been imported
import modify_llm
import train_llm

FEW = 16  # rows of the short run
NAMES = sorted(
    TECHNIQUES, key=lambda name: not name.startswith("LoRA")
)  # LoRA first: what others are compared to
SETTINGS = {name: technique_flags(name, "gpt2") for name in NAMES}
SETTINGS["selective, head frozen"] = [*SETTINGS["selective, lower half frozen"], "--freeze_head"]
PEERS = {
    "Trainer + PEFT, at its best": "trainer bf16 group",  # rows grouped by length, no dropout
    "Trainer + PEFT, as it comes": "trainer fp32 dynamic",  # GPT-2's dropout of 0.1
    "TRL, packed": "trl bf16 packed",
}


def run(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak resident GB) of a command, by the operating system."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(command)}\n{said.read().decode()[-2000:]}")
    return seconds, usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def matmul_rate() -> float:
    """Matrix-product FLOP a second in the precision that training takes here, at the shape of GPT-2's feed-forward."""
    args = argparse.Namespace(device="auto", precision="auto")
    runtime = train_llm.choose_runtime(args)
    a, b = (
        torch.randn(s, device=runtime.device, dtype=runtime.dtype)
        for s in ((2048, 768), (768, 3072))
    )

    def seconds() -> float:
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        return time.perf_counter() - start

    return 2 * 2048 * 768 * 3072 / statistics.median(seconds() for _ in range(30))


def flops_per_token(flags: list[str]) -> float:
    """Of the products with weight matrices: 2 a parameter forward, 2 back to the input, 2 for what trains."""

    args = parse(["--dataset_path=-", *flags])
    parameters = {
        n: p
        for n, p in modify_llm.meta_model(args).named_parameters()
        if p.ndim == 2 and ".wpe." not in n
    }
    blocks = {n: int(n.split(".h.")[1].split(".")[0]) if ".h." in n else -1 for n in parameters}
    lowest = min(blocks[name] for name, parameter in parameters.items() if parameter.requires_grad)
    return sum(
        parameter.numel()
        * (2 + 2 * (blocks[name] >= lowest or blocks[name] < 0) + 2 * parameter.requires_grad)
        for name, parameter in parameters.items()
        if "prefix" not in name
    )


def difference(command: list[str], rows: tuple[Path, Path], few: int, tokens: int) -> dict:
    """Tokens a second beyond the first rows, and the peak memory of the longer run."""
    short, _ = run([*command, str(rows[0])])
    long, memory = run([*command, str(rows[1])])
    return {"tokens": tokens / (long - short), "records": few / (long - short), "memory": memory}


def ours(directory: Path, flags: list[str]) -> list[str]:
    command = [
        sys.executable,
        str(ROOT / "train_llm.py"),
        f"--model_name_or_path={directory / 'model'}",
        *flags,
    ]
    command += [
        f"--output_dir={directory / 'run'}",
        "--overwrite_output_dir",
        "--epochs=1",
        "--text_format=output",
    ]
    return [*command, "--eval_fraction=0", "--num_samples=0", "--dataset_path"]


def peer(name: str, directory: Path, path: Path) -> None:
    """The same work by a library, in this process: LoRA r=4 on every Conv1D, batch size 8, one pass."""

    library, precision, batching = name.split()
    bf16, tokenizer = precision == "bf16", data_pipeline.load_tokenizer()
    if library == "trainer":
        grouped = {"train_sampling_strategy": "group_by_length"} if batching == "group" else {}
        dropout, rows = (
            0.1 if batching == "dynamic" else 0.0,
            data_pipeline.load_dataset(path, tokenizer),
        )
        train_with_peft(
            directory / "model", rows, directory / "peer", dropout, bf16=bf16, **grouped
        )
        return
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    base = GPT2LMHeadModel.from_pretrained(
        directory / "model", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=LAYERS, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    settings = SFTConfig(
        output_dir=str(directory / "peer"), per_device_train_batch_size=4, num_train_epochs=1, bf16=bf16, packing=True,
        max_length=512, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), report_to=[],
        save_strategy="no", logging_steps=10_000, disable_tqdm=True,
    )  # fmt: skip
    texts = Dataset.from_list([{"text": row["output"]} for row in json.loads(path.read_text())])
    SFTTrainer(
        base, args=settings, train_dataset=texts, processing_class=tokenizer, peft_config=config
    ).train()


def loading(args: argparse.Namespace, directory: Path) -> None:
    """Reading, tokenising and checking JSON lines of so many rows: the dataset's over and over, each text changed."""
    source, points = json.loads(Path(args.dataset_path).read_text(encoding="utf-8")), []
    print("| rows | seconds | peak memory |\n| ---: | ---: | ---: |")
    for number in map(int, args.loading.split(",")):
        path = directory / "rows.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for i in range(number):
                row = source[i % len(source)]
                file.write(json.dumps(row | {"output": f"{row['output']} ({i})"}) + "\n")
        script = f"import data_pipeline as d; assert len(d.load_dataset({str(path)!r})) == {number}"
        seconds, memory = run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {script}"]
        )
        points.append((number, seconds, memory))
        print(f"| {number:,} | {seconds:.1f} | {memory:.2f} GB |", flush=True)
    if args.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, column, label in zip(
            figure.subplots(1, 2), (1, 2), ("seconds", "peak memory, GB"), strict=True
        ):
            axes.plot([p[0] for p in points], [p[column] for p in points], "o-", color="#4c72b0")
            axes.set(xlabel="rows of JSON lines", ylabel=label, ylim=(0, None))
            axes.grid(alpha=0.3)
        figure.savefig(args.plot, dpi=120)


def training(args: argparse.Namespace, directory: Path) -> None:

    if args.model_name_or_path:
        (directory / "model").symlink_to(Path(args.model_name_or_path).resolve())
    else:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(directory / "model")
    source = json.loads(Path(args.dataset_path).read_text(encoding="utf-8"))
    source = [row for row in source if len(row["output"].split()) >= max(1, args.min_words)][
        : args.rows
    ]
    rows = directory / "few.json", directory / "all.json"
    for path, part in zip(rows, (source[:FEW], source), strict=True):
        path.write_text(json.dumps(part), encoding="utf-8")
    lengths = data_pipeline.load_dataset(rows[1]).lengths
    tokens, few = int(lengths[FEW:].sum()), len(lengths) - FEW
    print(
        f"\n{len(source)} rows of {lengths.mean():.0f} tokens; {args.repeats} x in turn, medians\n"
    )
    commands = {}
    for name in [
        n for n in SETTINGS if args.only in n and (not args.peers or n.startswith("LoRA"))
    ]:
        commands[name] = ours(directory, SETTINGS[name])
        if args.compile:
            commands[f"{name}, compiled"] = ours(directory, [*SETTINGS[name], "--compile"])
            run(
                [*commands[f"{name}, compiled"], str(rows[0])]
            )  # the compiler keeps on disk what it has compiled
    for name, kind in PEERS.items() if args.peers else ():
        commands[name] = [
            sys.executable,
            __file__,
            "--as_peer",
            kind,
            "--model_name_or_path",
            str(directory),
            "--dataset_path",
        ]
    found: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            rate = matmul_rate()
            found[name].append(difference(command, rows, few, tokens) | {"rate": rate})
    print(
        "| | tokens/s | records/s | peak memory | share of the matrix-product rate | LoRA's is |\n"
        + "| --- "
        + "| ---: " * 5
        + "|"
    )
    middle = {
        n: {k: statistics.median(r[k] for r in results) for k in results[0]}
        for n, results in found.items()
    }
    first = next(iter(middle.values()))["tokens"]
    for name, row in middle.items():
        flags = SETTINGS.get(name.removesuffix(", compiled"))
        share = f"{row['tokens'] * flops_per_token(flags) / row['rate']:.0%}" if flags else ""
        figures = f"{row['tokens']:,.0f} | {row['records']:.1f} | {row['memory']:.2f} GB | {share}"
        print(f"| {name} | {figures} | {first / row['tokens']:.2f} x |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset_path", default=str(ROOT / "tests" / "data" / "alpaca_sample.json")
    )
    parser.add_argument("--model_name_or_path", default="")
    parser.add_argument("--rows", type=int, default=144)
    parser.add_argument(
        "--min_words", type=int, default=0, help="only rows whose output has at least so many words"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="techniques whose name holds this")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="each of ours once more with train_llm.py's --compile",
    )
    parser.add_argument("--peers", action="store_true")
    parser.add_argument(
        "--loading", default="", help="measure the data pipeline instead, on so many rows each"
    )
    parser.add_argument("--plot", default="")
    parser.add_argument("--as_peer", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        peer(args.as_peer, Path(args.model_name_or_path), Path(args.dataset_path))
        return
    with tempfile.TemporaryDirectory() as directory:
        (loading if args.loading else training)(args, Path(directory))


if __name__ == "__main__":
    main()
