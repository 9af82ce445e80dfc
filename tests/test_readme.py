"""What the README tells a reader to type, to click and to look up is there, and works."""

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_gpt2

import data_pipeline
import modify_llm
import train_llm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {script.__name__: script for script in (data_pipeline, modify_llm, train_llm)}
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory, tokenizer):
    """A directory as the README's reader has it: a (tiny) gpt2/, the published file, a table."""
    directory = tmp_path_factory.mktemp("newcomer")
    tiny_gpt2(n_positions=1024, n_layer=6).save_pretrained(directory / "gpt2")
    tokenizer.save_pretrained(directory / "gpt2")
    (directory / "tests").symlink_to(ROOT / "tests")
    rows = json.loads((ROOT / "tests/data/alpaca_sample.json").read_text(encoding="utf-8"))[:24]
    (directory / "alpaca_data.json").write_text(json.dumps(rows), encoding="utf-8")
    pairs = "".join(f"What is {n} and one?,{n + 1}\n" for n in range(24))
    (directory / "qa.csv").write_text("question,answer\n" + pairs, encoding="utf-8")
    (directory / "questions.txt").write_text("Name a colour.\nName a fruit.\n", encoding="utf-8")
    return directory


def offline_commands():
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        ours = words[:1] == ["python"] and Path(words[1]).stem in SCRIPTS
        if ours and not {"...", "--demo", "--chat"} & {*words}:
            yield Path(words[1]).stem, words[2:]


def test_the_readmes_commands_run_one_after_the_other(newcomer, monkeypatch, capsys):
    monkeypatch.chdir(newcomer)
    run = list(offline_commands())
    assert len(run) >= 10
    for script, argv in run:
        assert SCRIPTS[script].main([*argv]) in (0, None), argv
    capsys.readouterr()


def test_the_readmes_python_runs(newcomer, monkeypatch, capsys):
    monkeypatch.chdir(newcomer)
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@functools.cache
def help_of(script):
    command = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_flags_of_the_measuring_commands_are_known():
    for line in COMMANDS:
        for script in re.findall(r"python (tests/\w+\.py)", line):
            known = help_of(script)
            source = (ROOT / script).read_text(encoding="utf-8")
            for flag in re.findall(r"(--\w+)", line.partition(script)[2]):
                assert flag in known or f'"{flag}"' in source, (script, flag)


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_what_the_layout_names_is_there():
    layout = README.partition("## How the code is laid out")[2].partition("\n## ")[0]
    names = set(re.findall(r"`([A-Za-z_]+(?:\.__?\w+)?)`", layout))
    assert len(names) > 20
    for name in names - {"best", "final"}:
        first, _, attribute = name.partition(".")
        owners = [vars(script)[first] for script in SCRIPTS.values() if first in vars(script)]
        assert owners or importlib.util.find_spec(first), name
        assert not attribute or hasattr(owners[0], attribute), name
