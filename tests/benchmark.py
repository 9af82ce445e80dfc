"""How fast is training, in how much memory, and beside the libraries?

    python tests/benchmark.py --dataset_path alpaca_data.json            # technique by technique
    python tests/benchmark.py --dataset_path alpaca_data.json --peers    # LoRA, Trainer + PEFT, TRL
    python tests/benchmark.py --dataset_path alpaca_data.json --peers --min_words 150   # long rows
    python tests/benchmark.py --loading 30000,300000,1000000 --plot loading.png
    python tests/benchmark.py --adapters 1,10,100    # so many LoRAs on one base, beside PEFT
    python tests/benchmark.py --launches     # what a step launches on a GPU, counted without one

Every run is a process of its own: `--steps` optimizer steps of 8 response texts each, drawn from
the first `--rows` rows. (Among a hundred, grouping by length finds none of like length, and whoever
pads looks slow.) The runs take turns, `--repeats` times, with another seed each time.

The speed is in tokens with a label, so without padding and without each row's first token, from
the third step's begin to the last step's end: 50 steps by default, since the Trainer sorts 50
batches at a time, from long to short. The memory is the process's peak: resident, or on CUDA what
PyTorch allocated. The model is a GPT-2 small with random weights, on which speed does not depend,
or --model_name_or_path. --peers needs: pip install peft accelerate datasets trl
"""

import argparse
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure  # before ours: it makes them importable
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

import data_pipeline
import modify_llm
import train_llm

BATCH_SIZE = 8
PACKED_TOKENS = 4 * 512  # a step of TRL's
WARM_UP = 2  # steps before the clock starts
LORA = "lora"  # first in each turn: what the others are compared with
PEERS = ("Trainer + PEFT, at its best", "Trainer + PEFT, as it comes", "TRL, packed")


def peak_memory() -> float:
    """Of this process, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage counts the process that started this one, too
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS gives bytes


def ours(*flags: str) -> dict[str, float]:
    """train_llm.py with these flags; its speed is that of its metrics.jsonl.

    A row there has the tokens a second since the row before, the logging itself left out. (A step
    waits for the device, so on CUDA too its clock is right.) How many tokens these were is known
    from the sampler.
    """
    flags = [*flags, f"--log_interval={WARM_UP}", "--eval_fraction=0", "--num_samples=0"]
    if status := train_llm.main(flags):
        sys.exit(status)
    args = measure.parse(flags)
    runtime, tokenizer = train_llm.choose_runtime(args), train_llm.tokenizer_for(args)
    rows, _ = train_llm.load_rows(args, tokenizer)
    loader = train_llm.make_loader(rows, args, runtime, tokenizer)
    batches, tokens, seconds = loader.batch_sampler.global_batches(), 0, 0.0
    lines = Path(args.output_dir, "metrics.jsonl").read_text().splitlines()
    for before, line in itertools.pairwise(map(json.loads, lines)):
        batch = torch.cat(batches[before["step"] : line["step"]])  # row numbers
        tokens += int(rows.label_counts[batch].sum())
        seconds += float(rows.lengths[batch].sum() / line["tokens_per_second"])
    return {"tokens": tokens, "seconds": seconds}


def peer(name: str, directory: str, steps: str, seed: str) -> dict[str, float]:
    """The same work by a library."""
    model_path, rows = f"{directory}/model", data_pipeline.load_dataset(f"{directory}/rows.json")
    settings = measure.trainer_settings(f"{directory}/peer")
    settings |= {"max_steps": int(steps), "seed": int(seed)}
    if name == "Trainer + PEFT, at its best":
        settings["train_sampling_strategy"] = "group_by_length"
        return timed(measure.peft_trainer(model_path, rows, **settings))
    if name == "Trainer + PEFT, as it comes":  # GPT-2's dropout, rows of any length together
        return timed(measure.peft_trainer(model_path, rows, 0.1, **settings | {"bf16": False}))
    as_many_tokens = round(int(steps) * BATCH_SIZE * rows.lengths.mean() / PACKED_TOKENS)
    settings["max_steps"] = max(WARM_UP + 2, as_many_tokens)
    return timed(trl_trainer(model_path, rows, **settings))


def trl_trainer(model_path: str, rows: data_pipeline.AlpacaDataset, **settings: Any) -> Trainer:
    """TRL's trainer with PEFT's LoRA, in batches of 4 x 512 tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings |= {"per_device_train_batch_size": 4, "packing": True, "max_length": 512}
    settings = SFTConfig(**settings, gradient_checkpointing=False)
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows])
    (model, lora), tokenizer = measure.peft_parts(model_path), data_pipeline.load_tokenizer()
    return SFTTrainer(
        model, settings, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )


class Clock(TrainerCallback):
    """Notes when the third step begins and when the last one ends."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP:
            self.begin = synchronised_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == args.max_steps:
            self.end = synchronised_time()


def synchronised_time() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed(trainer: Trainer) -> dict[str, float]:
    """Trains, and counts the labels of each batch."""
    clock, collate, labels = Clock(), trainer.data_collator, []

    def counting(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        labels.append(int((batch["labels"] != data_pipeline.IGNORED).sum()))
        return batch

    trainer.data_collator = counting
    trainer.add_callback(clock)
    trainer.train()
    tokens = sum(labels[WARM_UP : trainer.args.max_steps])  # it may have collated a batch ahead
    return {"tokens": tokens, "seconds": clock.end - clock.begin}


def load(path: str) -> dict[str, float]:
    """The data pipeline on a file."""
    start = time.perf_counter()
    rows = data_pipeline.load_dataset(path)
    return {"rows": len(rows), "seconds": time.perf_counter() - start}


def run(*command: str) -> dict[str, float]:
    """What `ours`, `peer` or `load` returns in a process of its own, and its peak memory."""
    command = [sys.executable, __file__, "--child", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def read_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """The rows whose response has at least --min_words words."""
    rows = data_pipeline.read_rows(args.dataset_path, "alpaca")

    return [row for row in rows if len(row["output"].split()) >= max(1, args.min_words)]


def write_inputs(args: argparse.Namespace, directory: Path) -> int:
    """rows.json and model/ for all runs. Returns the steps of a run, within one pass."""
    rows = read_rows(args)[: args.rows]
    steps = min(args.steps, len(rows) // BATCH_SIZE)
    if steps <= WARM_UP:
        too_short = f"{len(rows)} rows make {steps} steps; the clock starts at the third"
        raise ValueError(f"--steps {args.steps}: {too_short}")
    (directory / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    if args.model_name_or_path:
        (directory / "model").symlink_to(Path(args.model_name_or_path).resolve())
    else:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(directory / "model")
    lengths = data_pipeline.load_dataset(directory / "rows.json").lengths
    fewer = "" if len(rows) == args.rows else f" (there are no {args.rows:,})"
    print(f"{len(rows):,} rows{fewer} of {lengths.mean():.0f} tokens, {BATCH_SIZE} a step")
    runtime = measure.default_runtime()
    print(f"Steps {WARM_UP + 1} to {steps} on {runtime.device}, {runtime.dtype}", flush=True)
    return steps


def commands(args: argparse.Namespace, directory: Path, steps: int, seed: int) -> dict[str, list]:
    """The runs of a turn, by name."""
    model, found = f"{directory}/model", {}
    shared = [f"--model_name_or_path={model}", f"--dataset_path={directory}/rows.json"]
    shared += [f"--output_dir={directory}/run", "--overwrite_output_dir", f"--seed={seed}"]
    shared += ["--text_format=output", f"--max_steps={steps}", f"--batch_size={BATCH_SIZE}"]
    for technique, row in modify_llm.TECHNIQUES.items():  # lora is the first
        for _, _, settings in row.compared:
            name = train_llm.compared_name(technique, settings)
            if args.only not in name or (args.peers and name != LORA):
                continue
            flags = modify_llm.command_line({"modification_type": technique} | settings)
            found[name] = ["ours", *shared, *flags]
            if args.compile:
                found[f"{name}, compiled"] = [*found[name], "--compile"]
    for name in PEERS if args.peers else ():
        found[name] = ["peer", name, str(directory), str(steps), str(seed)]
    return found


def training(args: argparse.Namespace, directory: Path) -> None:
    """Speed and memory of each run, as they come, and in a table."""
    steps = write_inputs(args, directory)
    for name, command in commands(args, directory, steps, seed=0).items():
        if name.endswith("compiled"):
            run(*command)  # the compiler keeps on disk what it has compiled
    found: dict[str, list[dict]] = {}
    for turn in range(args.repeats):
        for name, command in commands(args, directory, steps, seed=turn).items():
            figures = run(*command)
            found.setdefault(name, []).append(figures)
            counted = f"{figures['tokens']:,} tokens in {figures['seconds']:.2f} s"
            print(f"turn {turn + 1}: {name}: {counted}, {figures['memory']:.2f} GB", flush=True)
    print("\n| | tokens/s | each turn | beside the first | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: |")
    first = None
    for name, turns in found.items():
        speeds = [figures["tokens"] / figures["seconds"] for figures in turns]
        speed, each = statistics.median(speeds), ", ".join(f"{s:,.0f}" for s in speeds)
        first, memory = first or speed, statistics.median(f["memory"] for f in turns)
        print(f"| {name} | {speed:,.0f} | {each} | {speed / first:.2f} x | {memory:.2f} GB |")


def hold(kind: str, directory: str, number: str) -> dict[str, float]:
    """So many LoRAs on one base: what each costs to load, in seconds and MB, and to switch to."""
    base = GPT2LMHeadModel.from_pretrained(f"{directory}/model")
    lora, ids = f"{directory}/lora", torch.arange(16)[None]
    base(ids)  # what is allocated once, for the first
    memory, started, models = resident_memory(), time.perf_counter(), []
    if kind == "ours":
        models = [modify_llm.load_trained(lora, base) for _ in range(int(number))]
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, lora, adapter_name="0")
        for i in range(1, int(number)):
            model.load_adapter(lora, adapter_name=str(i))
    seconds, added = time.perf_counter() - started, resident_memory() - memory
    started = time.perf_counter()
    _ = models[-1] if models else model.set_adapter("0")
    switch = time.perf_counter() - started
    return {"seconds": seconds, "added": added, "switch": switch}


def resident_memory() -> float:
    """Of this process now, in MB. Linux alone tells."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e6


def adapters(args: argparse.Namespace, directory: Path) -> None:
    """So many tuned models on one base, by load_trained and by PEFT's load_adapter."""
    path = args.model_name_or_path or f"{directory}/model"
    if args.model_name_or_path:
        (directory / "model").symlink_to(Path(path).resolve())
    else:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(path)
    modify_llm.save_trained(modify_llm.final_modify(model_name_or_path=path), directory / "lora")
    print("| LoRAs | | to load them | memory they add | to switch |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for number in args.adapters.split(","):
        for kind in ("ours", "PEFT"):
            found = run("hold", kind, str(directory), number)
            row = f"{found['seconds']:.1f} s | {found['added']:,.0f} MB"
            print(f"| {number} | {kind} | {row} | {1000 * found['switch']:.2f} ms |", flush=True)


def loading(args: argparse.Namespace, directory: Path) -> None:
    """Reading, tokenising and checking JSON lines: the dataset's over and over, each text new."""
    from matplotlib.figure import Figure

    source, path, points = read_rows(args), directory / "rows.jsonl", []
    print("| rows | seconds | peak memory |\n| ---: | ---: | ---: |")
    for number in map(int, args.loading.split(",")):
        with open(path, "w", encoding="utf-8") as file:
            for i, row in enumerate(itertools.islice(itertools.cycle(source), number)):
                file.write(json.dumps(row | {"output": f"{row['output']} ({i})"}) + "\n")
        points.append(run("load", str(path)))
        print("| {rows:,} | {seconds:.1f} | {memory:.2f} GB |".format(**points[-1]), flush=True)
    if args.plot:
        figure = Figure(figsize=(9, 4), layout="constrained")
        labels = {"seconds": "seconds", "memory": "peak memory, GB"}
        for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
            axes.plot([p["rows"] for p in points], [p[key] for p in points], "o-")
            axes.set(xlabel="rows of JSON lines", ylabel=label, ylim=(0, None))
        figure.savefig(args.plot, dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, *arguments = sys.argv[2:]
        figures = {"ours": ours, "peer": peer, "load": load, "hold": hold}[name](*arguments)
        print(json.dumps(figures | {"memory": peak_memory()}))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )  # fmt: skip
    add = parser.add_argument
    add("--dataset_path", default=str(data_pipeline.BUNDLED_SAMPLE), help="(the bundled sample)")
    add("--model_name_or_path", help="local directory (a random GPT-2 small)")
    add("--rows", type=int, default=3000, help="that batches are drawn from (3000)")
    add("--min_words", type=int, default=0, help="only rows with so many words of output (0)")
    add("--steps", type=int, default=52, help="optimizer steps of a run (52)")
    add("--repeats", type=int, default=3, help="turns (3)")
    add("--only", default="", help="techniques whose name holds this (all)")
    add("--compile", action="store_true", help="each of ours once more with --compile")
    add("--peers", action="store_true", help="LoRA beside Trainer + PEFT and TRL")
    add("--loading", help="the data pipeline instead, on so many rows: 30000,300000")
    add("--plot", help="a drawing of --loading")
    add("--adapters", help="so many LoRAs on one base instead, beside PEFT's: 1,10,100")
    add("--launches", action="store_true", help="the launches of a step on a GPU instead")
    args = parser.parse_args()
    if args.launches:
        import gpu_rehearsal

        gpu_rehearsal.launches()
        return
    command = measure.missing_packages("peft", "accelerate", "datasets", "trl")
    if args.peers and command:
        parser.error(f"--peers: packages are missing: {command}")
    with tempfile.TemporaryDirectory() as directory:
        try:
            work = loading if args.loading else adapters if args.adapters else training
            work(args, Path(directory))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
