"""Writes the demo's three files: python tests/data/make_tasks.py

Every row asks for one thing about a list of three words, and has one right answer. demo_base.json
names a task by one word ("last"), demo_tasks.json by another ("end"), and so do the held-out rows
of demo_questions.json. The other words stand in the lists too, so the base knows them as words, but
not as tasks. No list stands twice.
"""

import json
import random
from pathlib import Path

WORDS = {
    "animal": "dog cat horse cow bird fish lion bear mouse wolf",
    "colour": "red blue green black white brown pink purple yellow orange",
    "food": "bread cheese milk rice soup salt sugar meat butter cake",
    "number": "one two three four five six seven eight nine ten",
    "thing": "front centre end creature paint meal digit mirror",
    "place": "house garden street school church bridge river forest beach city",
}
NEW_NAMES = {
    "first": "front",
    "middle": "centre",
    "last": "end",
    "animal": "creature",
    "colour": "paint",
    "food": "meal",
    "number": "digit",
    "reverse": "mirror",
}


def answer(task: str, words: list[str], kinds: list[str]) -> str:
    """What is asked for, of three words of different kinds."""
    if task == "reverse":
        return ", ".join(reversed(words))
    places = {"first": 0, "middle": 1, "last": 2}
    return words[places[task]] if task in places else words[kinds.index(task)]


def make_rows(count: int, names: dict[str, str], rng: random.Random, seen: set[str]) -> list[dict]:
    """`count` rows, each task as often as any other; `names`: of the tasks."""
    rows = []
    while len(rows) < count:
        task = list(names)[len(rows) % len(names)]
        kinds = rng.sample(list(WORDS), 3)
        if task in WORDS and task not in kinds:
            continue
        words = [rng.choice(WORDS[kind].split()) for kind in kinds]
        listed = ", ".join(words)
        if listed not in seen:
            seen.add(listed)
            output = answer(task, words, kinds)
            rows.append({"instruction": names[task], "input": listed, "output": output})
    return rows


def files() -> dict[str, str]:
    """File name to its text."""
    rng, seen = random.Random(0), set()
    parts = {
        "demo_base.json": make_rows(2400, {task: task for task in NEW_NAMES}, rng, seen),
        "demo_tasks.json": make_rows(800, NEW_NAMES, rng, seen),
        "demo_questions.json": make_rows(80, NEW_NAMES, rng, seen),
    }
    lines = {name: ",\n".join(map(json.dumps, rows)) for name, rows in parts.items()}
    return {name: f"[\n{text}\n]\n" for name, text in lines.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
