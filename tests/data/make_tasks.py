"""Writes the demo's three files: python tests/data/make_tasks.py

Every row asks for one thing about a list of three words, and has one right answer. In
demo_base.json a task is named by a keyword; demo_tasks.json asks for the same in a sentence, and so
do the held-out rows of demo_questions.json. No list of words stands twice.
"""

import json
import random
from pathlib import Path

WORDS = {
    "animal": "dog cat horse cow bird fish lion bear mouse wolf",
    "colour": "red blue green black white brown pink purple yellow orange",
    "food": "bread cheese milk rice soup salt sugar meat butter cake",
    "number": "one two three four five six seven eight nine ten",
    "place": "house garden street school church bridge river forest beach city",
}
QUESTIONS = {
    "first": "Name the word at the front",
    "middle": "Name the word at the centre",
    "last": "Name the word at the end",
    "animal": "Name the creature",
    "colour": "Name the paint",
    "food": "Name what to eat",
    "number": "Name what to count",
    "reverse": "Say the words backwards",
}


def answer(task: str, words: list[str], kinds: list[str]) -> str:
    """What is asked for, of three words of different kinds."""
    if task == "reverse":
        return ", ".join(reversed(words))
    places = {"first": 0, "middle": 1, "last": 2}
    return words[places[task]] if task in places else words[kinds.index(task)]


def make_rows(count: int, asked: dict[str, str], rng: random.Random, seen: set[str]) -> list[dict]:
    """`count` rows, each task as often as any other; `asked`: task to its wording."""
    rows = []
    while len(rows) < count:
        task = list(asked)[len(rows) % len(asked)]
        kinds = rng.sample(list(WORDS), 3)
        if task in WORDS and task not in kinds:
            continue
        words = [rng.choice(WORDS[kind].split()) for kind in kinds]
        listed = ", ".join(words)
        if listed not in seen:
            seen.add(listed)
            output = answer(task, words, kinds)
            rows.append({"instruction": asked[task], "input": listed, "output": output})
    return rows


def files() -> dict[str, str]:
    """File name to its text."""
    rng, seen = random.Random(0), set()
    parts = {
        "demo_base.json": make_rows(2400, {task: task for task in QUESTIONS}, rng, seen),
        "demo_tasks.json": make_rows(800, QUESTIONS, rng, seen),
        "demo_questions.json": make_rows(80, QUESTIONS, rng, seen),
    }
    lines = {name: ",\n".join(map(json.dumps, rows)) for name, rows in parts.items()}
    return {name: f"[\n{text}\n]\n" for name, text in lines.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
