"""Claim: whatever is killed, damaged or malformed at random, nothing is lost and nothing wrong is taken for good.

    python tests/campaign.py kills --number 100       # kill -9 or a signal at any moment, then --resume_from auto: the same bits
    python tests/campaign.py splits --number 40       # the same, resumed by other batch sizes, accumulations and processes: the same losses
    python tests/campaign.py flips --number 200       # a byte flipped or a file cut short: never loaded as if good
    python tests/campaign.py datasets --number 300    # malformed files: exactly their rows, or one line and status 2

The same --seed draws the same cases (a kill by the clock falls where the machine happens to be). Each ends with one
line of figures, and with status 1 if anything was lost; everything is written to a temporary directory.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from matplotlib.figure import Figure
from tiny import tiny_gpt2
from tokenizers import pre_tokenizers
from transformers import GPT2Tokenizer
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_pipeline
import train_llm
from train_llm import STOP_SIGNALS

Moment = tuple[str, int, int]  # (file, line, how often it was reached)
TECHNIQUES = [
    ["--modification_type=lora", "--lora_dropout=0.1"],
    ["--modification_type=full"],
    [
        "--modification_type=prefix",
        "--prefix_type=key_value",
        "--prefix_length=5",
        "--prefix_projection_size=16",
    ],
]
SAVING = ["--save_interval=1", "--save_total_limit=2"]
SOURCES = tuple(
    str(Path(train_llm.__file__).parent / f"{name}.py") for name in ("train_llm", "modify_llm")
)
SOURCES += (shutil.__file__, Path.write_text.__code__.co_filename)
HOLDS_TEXT = ("instruction", "input", "output")


# ---- short runs of a tiny model --------------------------------------------------------------------------------------


def prepare(directory: Path) -> None:
    """A random model of two layers with a token a byte, and 20 rows."""
    disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = GPT2Tokenizer(
        vocab={c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, merges=[]
    )
    tiny_gpt2(vocab_size=257, eos_token_id=256, bos_token_id=256).save_pretrained(
        directory / "base"
    )
    tokenizer.save_pretrained(directory / "base")
    rows = [{"q": "Q" * (i % 7 + 1), "a": "abc" * (i % 5 + 1)} for i in range(20)]
    (directory / "rows.json").write_text(json.dumps(rows))


def flags(directory: Path, output_dir: Path, *more: str) -> list[str]:
    """A run of 6 steps; with dropout, an evaluation every 2 steps, a line of the log every 2."""
    settings = {
        "dataset_path": directory / "rows.json", "model_name_or_path": directory / "base", "output_dir": output_dir,
        "text_format": "{q}||{a}", "max_length": 64, "eval_fraction": 0.2, "batch_size": 2, "max_steps": 6,
        "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 0.01, "log_interval": 2, "eval_interval": 2,
        "num_samples": 1, "max_new_tokens": 4, "device": "cpu",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()] + list(more)


def hashes(directory: Path) -> dict[str, str]:
    """{file: sha256} of all below a directory, but the lock."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != ".lock")
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def outcome(output_dir: Path) -> dict:
    """What a run comes to, however often it was interrupted; speed alone depends on the clock."""
    found: dict = {name: hashes(output_dir / name) for name in ("final", "best")}
    for name in ("metrics.jsonl", "predictions.jsonl"):
        lines = (output_dir / name).read_text().splitlines() if (output_dir / name).exists() else []
        found[name] = [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in lines
        ]
    found["curves"] = (output_dir / "training_curves.png").exists()
    return found | {"leftovers": sorted(p.name for p in output_dir.glob(".*") if p.name != ".lock")}


def differences(output_dir: Path, expected: dict) -> list[str]:
    found = outcome(output_dir)
    return [f"{name} differs" for name in expected if found[name] != expected[name]]


def quick_figures() -> contextlib.AbstractContextManager:
    """Drawing would take longer than training."""
    return mock.patch.object(
        Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn")
    )


def in_this_process(
    main: Callable, argv: list[str], seconds: int = 60
) -> tuple[int | str, str, str]:
    """(exit status, or what it raised; stdout; stderr) of a script's main."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8"),
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"),
    )
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as leaving:
            status = leaving.code
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"[:300]
        finally:
            signal.alarm(0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return status, texts[0], texts[1]


def in_a_process(
    work: Callable[[], object], log: Path, after: float | None = None, by: int = signal.SIGKILL
) -> int:
    """The exit status of `work` in a process of its own, a fork that starts with everything imported.

    It leads a group of its own, which gets the signal as from `timeout`, SLURM or torchrun.
    """
    log.write_text("")
    if not (child := os.fork()):
        status = 70
        os.setpgid(0, 0)
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            status = work() or 0
        except KeyboardInterrupt:
            status = 130
        finally:
            sys.stdout.flush()
            os._exit(status)
    with contextlib.suppress(PermissionError):  # whichever of the two comes first
        os.setpgid(child, child)
    if after is not None:
        time.sleep(after)
        os.killpg(child, by)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):  # other ranks, of a leader that was killed
        os.killpg(child, signal.SIGKILL)
    return status


# ---- kills -----------------------------------------------------------------------------------------------------------


def traced(
    argv: list[str], die_at: Moment | None = None, book: Path | None = None,
    by: int = signal.SIGKILL,
) -> int:  # fmt: skip
    """train_llm.main, killed (or sent another signal) where it is about to run a line for the n-th
    time; `book` gets how often each ran."""
    reached: Counter = Counter()

    def trace(frame: object, event: str, _: object) -> Callable | None:
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            reached[place] += 1
            if die_at and place == die_at[:2] and reached[place] == die_at[2]:
                os.kill(os.getpid(), by)
        return trace if frame.f_code.co_filename in SOURCES else None

    with quick_figures():
        if die_at or book:
            sys.settrace(trace)
        status = train_llm.main(argv)
        sys.settrace(None)
    if book:
        book.write_text(json.dumps([[*place, times] for place, times in reached.items()]))
    return status


def kills(number: int, draw: random.Random, directory: Path) -> tuple[str, list[str]]:
    """Each run is killed or sent a signal, at a random time or a random line of code, and resumed;
    one in three resumed ones again."""
    log, lost, counts = directory / "log", [], Counter()
    in_a_process(lambda: prepare(directory), log)
    references = []
    for i, technique in enumerate(TECHNIQUES):
        whole, cut, books = (
            directory / f"whole{i}",
            directory / f"cut{i}",
            [directory / "book0", directory / "book1"],
        )
        argv, again = (flags(directory, place, *technique, *SAVING) for place in (whole, cut))
        resume = [*again, "--resume_from=auto"]
        start = time.perf_counter()
        assert in_a_process(lambda argv=argv: traced(argv), log) == 0, log.read_text()
        seconds = time.perf_counter() - start
        assert in_a_process(lambda again=again, books=books: traced(again, book=books[0]), log) == 0
        shutil.rmtree(cut / "final")
        shutil.rmtree(
            cut / "checkpoints" / "step_00000006"
        )  # what is left has half of its way to go again
        assert (
            in_a_process(lambda resume=resume, books=books: traced(resume, book=books[1]), log) == 0
        )
        references.append(
            (seconds, [json.loads(book.read_text()) for book in books], outcome(whole))
        )
    for i in itertools.count():
        technique, (seconds, lines, expected) = i % len(TECHNIQUES), references[i % len(TECHNIQUES)]
        output_dir, resumed, moments = directory / f"run{i}", False, []
        while True:
            argv, there = (
                flags(directory, output_dir, *TECHNIQUES[technique], *SAVING),
                checkpoint_steps(output_dir),
            )
            argv += resumed * ["--resume_from=auto"]
            by_clock = die_at = None
            # Half of them by a signal that asks for a checkpoint and the end.
            by = draw.choice([signal.SIGKILL] * len(STOP_SIGNALS) + STOP_SIGNALS)
            if counts["kills"] < number and (not resumed or draw.random() < 1 / 3):
                if draw.random() < 0.5:
                    by_clock = draw.random() * seconds
                else:
                    *place, times = draw.choice(lines[resumed])
                    die_at = (*place, draw.randint(1, times))
            status = in_a_process(
                lambda argv=argv, die_at=die_at, by=by: traced(argv, die_at, by=by),
                log,
                by_clock,
                by,
            )
            text = log.read_text()
            if resumed and "Checkpoint skipped" in text:
                lost.append(f"run {i}: a checkpoint was damaged after {moments}: {text}")
            went_on = re.search(r"Resumed from \S+ at step (\d+)", text)
            if there and (went_on or status == 0) and (not went_on or int(went_on[1]) < there[-1]):
                lost.append(f"run {i}: not resumed from step {there[-1]} after {moments}: {text}")
            stopped = re.search(r"Stopped by \S+ at step (\d+)", text)
            if stopped and int(stopped[1]) not in checkpoint_steps(output_dir):
                lost.append(f"run {i}: no checkpoint of the step announced: {text}")
            if status not in (-by, 128 + by):
                break
            counts["by signals"] += by != signal.SIGKILL
            moments.append(
                f"{Path(die_at[0]).name}:{die_at[1]} ({die_at[2]})"
                if die_at
                else f"{by_clock:.3f} s"
            )
            counts["by the clock" if by_clock is not None else "at a line"] += 1
            counts["of a resumed run"] += resumed
            counts["in a save"] += any(output_dir.glob(".new_*")) or any(output_dir.glob(".old_*"))
            counts["kills"], resumed = counts["kills"] + 1, True
        if (
            wrong := differences(output_dir, expected)
            if status == 0
            else [f"exit status {status}: {text}"]
        ):
            lost.append(f"run {i}: {'; '.join(wrong)} after kills at {', '.join(moments)}")
        shutil.rmtree(output_dir, ignore_errors=True)
        if counts["kills"] >= number:
            break
    kinds = ("by the clock", "at a line", "in a save", "of a resumed run", "by signals")
    told = ", ".join(f"{counts[name]} {name}" for name in kinds)
    return f"{counts['kills']} kills ({told}) in {i + 1} runs", lost


def checkpoint_steps(output_dir: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in output_dir.glob("checkpoints/step_*"))


# ---- splits ----------------------------------------------------------------------------------------------------------

SPLITS = [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)]  # rows, micro-batches, processes


def as_ranks(argv: list[str], processes: int) -> int:
    """train_llm.main in this process and forks of it, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = next((rank for rank in range(1, processes) if not os.fork()), 0)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    place |= {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    return train_llm.main(argv)


def logged_losses(output_dir: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


def splits(number: int, draw: random.Random, directory: Path) -> tuple[str, list[str]]:
    """Each run is killed or sent a signal at up to two random times, and each time goes on by
    another split of its four rows a step. Without dropout, whose masks would be others."""
    log, lost, counts, wholes = directory / "log", [], Counter(), []
    in_a_process(lambda: prepare(directory), log)
    exact = [*SAVING, "--dropout=0", "--lora_dropout=0", "--precision=fp32", "--num_samples=0"]
    for i, technique in enumerate(TECHNIQUES):
        argv = flags(directory, directory / f"whole{i}", *technique, *exact)
        start = time.perf_counter()
        assert in_a_process(lambda argv=argv: train_llm.main(argv), log) == 0, log.read_text()
        wholes.append((time.perf_counter() - start, logged_losses(directory / f"whole{i}")))
    for i in itertools.count():
        technique, (seconds, expected) = TECHNIQUES[i % len(wholes)], wholes[i % len(wholes)]
        output_dir, ways, status = directory / f"run{i}", [], -1
        while status != 0:
            way = draw.choice([split for split in SPLITS if split not in ways[-1:]])
            argv = flags(directory, output_dir, *technique, *exact, "--resume_from=auto")
            argv += [f"--batch_size={way[0]}", f"--gradient_accumulation_steps={way[1]}"]
            by = draw.choice([signal.SIGKILL] * len(STOP_SIGNALS) + STOP_SIGNALS)
            interrupted = counts["kills"] < number and len(ways) < 2
            after = draw.uniform(0.4, 1.0) * seconds * way[2] if interrupted else None
            status = in_a_process(lambda argv=argv, way=way: as_ranks(argv, way[2]), log, after, by)
            ways.append(way)
            if status not in (0, -by, 128 + by):
                lost.append(f"run {i}: {ways}, exit status {status}: {log.read_text()}")
                break
            counts["kills"] += status != 0
            counts["by signals"] += status != 0 and by != signal.SIGKILL
            counts["of two processes"] += status != 0 and way[2] > 1
            counts["resumed"] += "Resumed from" in log.read_text()
        found = logged_losses(output_dir) if status == 0 else []
        for (step, loss), (found_step, found_loss) in zip(expected, found, strict=False):
            if step != found_step or abs(loss - found_loss) > 1e-4 * loss:
                lost.append(f"run {i}: {ways}, step {found_step}: {found_loss}, not {loss}")
        if status == 0 and len(found) != len(expected):
            lost.append(f"run {i}: {ways}, {len(found)} rows of metrics, not {len(expected)}")
        if counts["kills"] >= number:
            break
    kinds = ("by signals", "of two processes", "resumed")
    told = ", ".join(f"{counts[name]} {name}" for name in kinds)
    return f"{counts['kills']} kills ({told}) in {i + 1} runs", lost


# ---- flips -----------------------------------------------------------------------------------------------------------


def damage(directory: Path, draw: random.Random) -> tuple[str, bool]:
    """Flips a byte of a file, or cuts it short. Returns (what, whether it is a manifest that still says the same)."""
    files = (
        path for path in directory.iterdir() if path.stat().st_size and path.name != "README.md"
    )
    file = draw.choice(sorted(files))  # the model card is free to edit
    before = file.read_bytes()
    at = draw.randrange(len(before))
    after = before[:at]
    if flip := draw.random() < 0.7:
        after += bytes([before[at] ^ draw.randint(1, 255)]) + before[at + 1 :]
    file.write_bytes(after)
    what = (
        f"{directory.name}/{file.name} {'flipped' if flip else 'cut'} at byte {at} of {len(before)}"
    )
    if file.name == "manifest.json":
        with contextlib.suppress(ValueError):
            return what, json.loads(after) == json.loads(before)
    return what, False


def refusal(status: int | str, err: str, script: str) -> str:
    """What is wrong with how bad input was refused; nothing: ''."""
    if status == 2 and re.fullmatch(rf"{re.escape(script)}: error: \S[^\n]*\n", err):
        return ""
    return f"status {status}, stderr {err[-300:]!r}"


def flips(number: int, draw: random.Random, directory: Path) -> tuple[str, list[str]]:
    """Damages copies of a finished run with checkpoints at steps 2, 4 and 6."""
    prepare(directory)
    lost, counts, copy = [], Counter(), directory / "copy"
    for i in range(number):
        whole, technique = (
            directory / f"whole{i % len(TECHNIQUES)}",
            TECHNIQUES[i % len(TECHNIQUES)],
        )
        if not whole.exists():
            status, _, err = in_this_process(train_llm.main, flags(directory, whole, *technique))
            assert status == 0, err
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        argv, steps = flags(directory, copy, *technique), checkpoint_steps(copy)
        places = [copy / "checkpoints" / f"step_{step:08d}" for step in reversed(steps)]
        kind = draw.choice(["auto", "auto", "by path", "final/, auto", "final/, by path"])
        if kind == "auto":
            places = places[: draw.choice([1, 1, 2, 3])]
        else:
            places = [copy / "final" if "final" in kind else draw.choice(places)]
        done = [damage(place, draw) for place in places]
        still_good = [
            place.name for place, (_, harmless) in zip(places, done, strict=True) if harmless
        ]
        before = hashes(copy)
        if kind == "by path":
            argv += [f"--resume_from={places[0]}"]
        elif kind == "final/, by path":
            argv = [
                f"--adapter_path={places[0]}",
                "--eval_only",
                f"--dataset_path={directory / 'rows.json'}",
            ]
        else:
            argv += ["--resume_from=auto"]
        status, out, err = in_this_process(train_llm.main, argv)
        wrong = ""
        if kind.endswith("by path"):
            if not still_good:
                wrong = refusal(status, err, "train_llm.py")
                wrong = wrong or ("" if hashes(copy) == before else "files have changed")
        else:
            if status:
                wrong = f"status {status}, stderr {err[-300:]!r}"
            skipped = re.findall(r"^WARNING:.*Checkpoint skipped: \S+(step_\d+):", out, re.M)
            names = [place.name for place in places]
            bad = names[: names.index(still_good[0])] if still_good else names
            bad = bad if kind == "auto" else []
            wrong = wrong or ("" if skipped == bad else f"warned of {skipped}, not {bad}")
            if kind == "auto" and len(bad) == len(steps) and "starting at step 0" not in out:
                wrong = wrong or "does not start over"
            wrong = wrong or "; ".join(differences(copy, outcome(whole)))
        counts[kind] += 1
        if wrong:
            lost.append(f"case {i}, {kind}: {'; '.join(what for what, _ in done)}: {wrong}")
    return f"{number} damaged runs ({', '.join(f'{counts[k]} {k}' for k in sorted(counts))})", lost


# ---- datasets --------------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r'[ \t\n\r]*([\[\]{}:,]|"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"|'
    r"-?Infinity|NaN|true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|$)"
)
PLAIN = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def scalar(token: str) -> object:
    """A JSON string, null or NaN; any other value is 0: of these only the type matters here."""
    if token[0] != '"':
        if re.fullmatch(r"-?[0-9]{4301,}", token):
            raise ValueError("more digits than Python takes")
        return {"null": None, "NaN": float("nan")}.get(token, 0)
    text = re.sub(
        r"\\(u(....)|.)",
        lambda m: chr(int(m[2], 16)) if m[2] else PLAIN.get(m[1], m[1]),
        token[1:-1],
        flags=re.S,
    )
    return text.encode("utf-16-le", "surrogatepass").decode(
        "utf-16-le", "surrogatepass"
    )  # joins surrogate pairs


def own_json(text: str) -> tuple[object, int]:
    """(the value of a JSON text, how deep it is nested), read without the json module; raises ValueError."""
    root: list = []
    opened, keys, state, at, deepest = [root], [], "value", 0, 0
    while match := TOKEN.match(text, at):
        token, at = match[1], match.end()
        inner = opened[-1]
        if not token:
            if state == "after" and inner is root:
                return root[0], deepest
            break
        if token in "]}":
            empty = state == {"]": "first value", "}": "first key"}[token]
            if (
                inner is root
                or isinstance(inner, list) != (token == "]")
                or not (empty or state == "after")
            ):
                break
            opened.pop()
            state = "after"
        elif state in ("value", "first value") and token not in ":,":
            value = [] if token == "[" else {} if token == "{" else scalar(token)
            if isinstance(inner, list):
                inner.append(value)
            else:
                inner[keys.pop()] = value
            state = {"[": "first value", "{": "first key"}.get(token, "after")
            if token in "[{":
                opened.append(value)
                deepest = max(deepest, len(opened) - 1)
        elif state in ("key", "first key") and token[0] == '"':
            keys.append(scalar(token))
            state = "colon"
        elif state == "colon" and token == ":":
            state = "value"
        elif state == "after" and token == "," and inner is not root:
            state = "value" if isinstance(inner, list) else "key"
        else:
            break
    raise ValueError("not JSON")


def own_csv(text: str) -> tuple[list[dict], bool]:
    """(the rows of a CSV text, whether its header names a column twice or leaves the last unnamed),
    read without the csv module.

    Raises ValueError for quotes or fields that do not fit; fields that lack at a row's end are left out of the row.
    """
    rows: list[list[str]] = []
    field = re.compile(r'(?:"((?:[^"]|"")*)"|((?!")[^,\r\n]*))(,|\r\n|\r|\n|$(?!\n))')
    row, at = [], 0
    while at < len(text) or row:
        if not (match := field.match(text, at)):
            raise ValueError("quotes do not fit")
        row.append(match[2] if match[1] is None else match[1].replace('""', '"'))
        at = match.end()
        if match[3] != ",":
            if row != [""] or match[1] is not None:  # an empty line is none
                rows.append(row)
            elif not rows:
                raise ValueError("no header")
            row = []
    if any(len(row) > len(rows[0]) for row in rows):
        raise ValueError("a row with more fields than the header")
    records = [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
    doubtful = bool(rows) and (len(set(rows[0])) < len(rows[0]) or not rows[0][-1].strip())
    return records, doubtful


def own_rows(content: bytes, suffix: str) -> tuple[list[tuple[str, str]] | None, bool]:
    """(the (prompt, response) of each row that a file holds, None if it must be refused; whether refusing is fine)."""
    deepest, named_twice = 0, False
    try:
        text = content.decode("utf-8-sig", "surrogateescape")  # refused below, by its row
        if suffix == ".csv":
            records, named_twice = own_csv(text)
        elif text.lstrip().startswith("["):
            records, deepest = own_json(text)
        else:
            lines = re.split(r"\r\n|\r|\n", text)
            try:
                read = [own_json(line) for line in lines if line.strip()]
            except ValueError:  # one object over several lines
                read = [own_json(text)]
            records, deepest = (
                [value for value, _ in read],
                max((depth for _, depth in read), default=0),
            )
        if not isinstance(records, list) or not records:
            raise ValueError("no rows")
        rows = []
        for record in records:
            " ".join(record).encode()
            if "input" not in record and "input" in {name.strip().lower() for name in record}:
                raise ValueError("a column named almost so")
            texts = [({"input": ""} | record)[name] for name in HOLDS_TEXT]
            if texts[1] is None or texts[1] != texts[1]:
                texts[1] = ""
            for value in texts:
                value.encode()  # AttributeError: not text; UnicodeEncodeError, a ValueError: half a surrogate pair
            rows.append((f"<{texts[0]}><{texts[1]}>", texts[2]))
        half_pairs = (
            re.search(r"\\u[dD][89a-fA-F]", text) is not None
        )  # whole ones are spelt so too
        return rows, deepest > 100 or half_pairs or named_twice
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, True


def taken_rows(
    dataset: data_pipeline.AlpacaDataset, tokenizer: GPT2Tokenizer
) -> list[tuple[str, str]]:
    """The (prompt, response) of each row, from its tokens."""
    ends = dataset.offsets.tolist()
    rows = []
    for start, end, prompt in zip(
        ends[:-1], ends[1:], dataset.prompt_lengths.tolist(), strict=True
    ):
        ids = dataset.tokens[start : end - 1].tolist()  # without the end of text
        rows.append(
            tuple(
                tokenizer.backend_tokenizer.decode(part, False)
                for part in (ids[:prompt], ids[prompt:])
            )
        )
    return rows


TEXTS = [
    "", "a", "007", "nan", "null", "2020-01-01", "1e5", "True", 'say "yes", then', "two\nlines", "cr\r\nlf",
    "tab\tend ", "naïve café", "日本語のテキスト", "🎈🧩", "a,b;c", "<|endoftext|>", "### Response:", "{output}||",
    "nul\0in", "\u2028|\x85|\x0b", "\\ud800 spelt out", "'", '"', "x" * 3000, " lead", "\ufeffbom", "=1+1", "[1, 2]",
    "# no comment",
]  # fmt: skip
WRONG = [
    0, 7, -1.5, True, None, [], ["a"], {}, {"a": "b"}, float("nan"), float("inf"), "\ud800", "a\udc00b", 10**40, 1e308,
]  # fmt: skip
NOTHING = [
    b"",
    b" \n",
    b"[]",
    b"{}",
    b"[{}]",
    b"\n\n",
    b"null",
    b'"a"',
    b"\xef\xbb\xbf",
    b"[,]",
    b"\0",
    b"\xff\xfe",
]


def deep(draw: random.Random) -> str:
    depth = draw.choice([3, 50, 500, 990, 1100, 3000, 9000, 20_000, 100_000])
    return draw.choice(
        ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth]
    )


def malformed_rows(draw: random.Random) -> list:
    """Rows as a JSON text could hold them, most often with one that is not as it should be."""
    rows: list = [
        {name: draw.choice(TEXTS) for name in HOLDS_TEXT} for _ in range(draw.randint(1, 6))
    ]
    row, name, other = (
        draw.choice(rows),
        draw.choice(HOLDS_TEXT),
        draw.choice([*HOLDS_TEXT, "extra"]),
    )
    match draw.choice(
        ["good"] * 8
        + ["extra"] * 3
        + ["wrong type", "wrong type", "missing", "no object", "other keys"]
    ):
        case "wrong type":
            row[name] = draw.choice(WRONG)
        case "missing":
            del row[name]
        case "extra":
            row[draw.choice(["extra", "", "Output", "\ud800", "0", "a\nb"])] = draw.choice(
                WRONG + TEXTS
            )
        case "no object":
            rows[draw.randrange(len(rows))] = draw.choice([*WRONG, "text", list(row.values())])
        case "other keys":
            row[f" {name}"] = row.pop(name)
    if draw.random() < 0.2 and isinstance(rows[-1], dict):
        rows[-1][draw.choice([other, "extra", "extra"])] = (
            "@@"  # a place for what no Python value can spell
        )
    return rows


def malformed_file(draw: random.Random) -> tuple[bytes, str, str]:
    """(content, suffix, what was done to it): rows, well-formed or not, then perhaps bytes that are not."""
    rows, suffix, way = malformed_rows(draw), draw.choice([".json", ".jsonl", ".csv"]), ""
    if suffix == ".csv":
        file, good = io.StringIO(newline=""), [row for row in rows if isinstance(row, dict)]
        header = list(dict.fromkeys(key for row in good for key in row)) or list(HOLDS_TEXT)
        quoting, end = draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]), draw.choice(["\n", "\r\n"])
        writer = csv.writer(file, quoting=quoting, lineterminator=end)
        writer.writerows([header, *([row[key] for key in header if key in row] for row in good)])
        text = file.getvalue()
    else:
        ascii_, indent = draw.random() < 0.5, draw.choice([None, None, 1])
        rows = [
            {"duplicates": row} if isinstance(row, dict) and draw.random() < 0.02 else row
            for row in rows
        ]
        lines = [json.dumps(row, ensure_ascii=ascii_) for row in rows]
        whole = json.dumps(rows, ensure_ascii=ascii_, indent=indent)
        text = (
            whole
            if suffix == ".json" and draw.random() < 0.85
            else draw.choice(["\n", "\r\n"]).join(lines)
        )
        huge = draw.choice(
            ["1" * 4000, "1" * 5000, "-1e999", "1E+400", "1.", "01", "-", "NaN", "-Infinity", "nan"]
        )
        odd = [
            huge,
            huge,
            deep(draw),
            deep(draw),
            '"\\ud83d\\ude00"',
            '"\\ude00"',
            '"\\u12"',
            '"\\x"',
            "'a'",
            '"\t"',
        ]
        text = text.replace('"@@"', draw.choice(odd))
        if draw.random() < 0.1:
            text, way = (
                text.replace('"input":', '"output": "first", "input":', 1),
                "duplicate key, ",
            )
    content = text.encode("utf-8", "surrogatepass")
    at, more = draw.randrange(len(content)), draw.randrange(1, 20)
    ways: dict[str, Callable[[], bytes]] = {
        "as it is": lambda: content,
        "cut": lambda: content[:at],
        "last byte cut": lambda: content[:-1],
        "byte flipped": lambda: (
            content[:at] + bytes([content[at] ^ draw.randint(1, 255)]) + content[at + 1 :]
        ),
        "bit flipped": lambda: (
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        ),
        "bytes lost": lambda: content[:at] + content[at + more :],
        "bytes twice": lambda: content[: at + more] + content[at:],
        "put in": lambda: (
            content[:at] + draw.choice(list(b'"",,\0\r\n[]{}: \\')).to_bytes() + content[at:]
        ),
        "mark": lambda: b"\xef\xbb\xbf" * draw.choice([1, 1, 2]) + content,
        "utf-16": lambda: text.encode(
            draw.choice(["utf-16", "utf-16-le", "utf-32"]), "surrogatepass"
        ),
        "latin-1": lambda: text.encode("latin-1", "replace"),
        "nothing": lambda: draw.choice(NOTHING),
        "trailing": lambda: (
            content
            + draw.choice([b",", b"]", b"}", b"\n\n", b"\n ", b"\0", b'"', b"\xff", content])
        ),
        "leading": lambda: (
            draw.choice([b",", b"\n", b" ", b"[", b"\0", b"// \n", b'"', b"\xc2\xa0"]) + content
        ),
        "line ends": lambda: content.replace(b"\n", b"\r"),
    }
    chosen = draw.choice([*sorted(ways), *["as it is"] * 4])
    return ways[chosen](), suffix, way + chosen


def datasets(number: int, draw: random.Random, directory: Path) -> tuple[str, list[str]]:
    lost, counts, tokenizer, seen = [], Counter(), data_pipeline.load_tokenizer(), []
    load = data_pipeline.load_dataset

    def watched(*args: object, **kwargs: object) -> data_pipeline.AlpacaDataset:
        seen.append(load(*args, **kwargs))
        return seen[-1]

    for i in range(number):
        content, suffix, what = malformed_file(draw)
        path = directory / f"rows{suffix}"
        path.write_bytes(content)
        expected, may_refuse = own_rows(content, suffix)
        argv = [
            f"--dataset_path={path}",
            "--num_workers=0",
            "--max_length=200000",
            "--batch_size=1",
        ]
        argv += ["--text_format=<{instruction}><{input}>||{output}"]
        seen.clear()
        with mock.patch.multiple(
            data_pipeline, load_dataset=watched, load_tokenizer=lambda *_: tokenizer
        ):
            status, _, err = in_this_process(data_pipeline.main, argv, 30)
        if status == 0:
            wrong = "" if expected is not None else "loaded, though not to be read"
            wrong = wrong or (
                ""
                if taken_rows(seen[0], tokenizer) == expected
                else "loaded other rows than it holds"
            )
            wrong = wrong or (f"stderr {err[:300]!r}" if err else "")
        else:
            wrong = refusal(status, err, "data_pipeline.py") or (
                "" if may_refuse else f"refused good rows: {err}"
            )
        counts["loaded" if status == 0 else "refused"] += 1
        if wrong:
            lost.append(
                f"case {i}, {suffix}, {what}: {wrong}; begins {content[:200]!r}, {len(content)} bytes"
            )
    return (
        f"{number} files ({counts['loaded']} loaded row for row, {counts['refused']} refused in one line)",
        lost,
    )


def main(argv: list[str] | None = None) -> int:
    campaigns = {"kills": (kills, 100), "splits": (splits, 40)}
    campaigns |= {"flips": (flips, 200), "datasets": (datasets, 300)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("campaign", choices=campaigns)
    parser.add_argument(
        "--number", type=int, help="of cases (100 kills, 40 splits, 200 flips, 300 datasets)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    campaign, number = campaigns[args.campaign]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, quick_figures():
        told, lost = campaign(args.number or number, random.Random(args.seed), Path(directory))
    for line in lost:
        print(line)
    print(
        f"{args.campaign}, seed {args.seed}: {told}, {len(lost)} lost, {time.perf_counter() - start:.0f} s"
    )
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
