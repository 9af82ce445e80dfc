"""What the README and MEASUREMENTS.md tell a reader to type, to click and to look up is there, and works."""

import ast
import functools
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
README, MEASUREMENTS = ROOT / "README.md", ROOT / "tests" / "MEASUREMENTS.md"
TEXTS = {page: page.read_text(encoding="utf-8") for page in (README, MEASUREMENTS)}
SCRIPTS = {script.__name__: script for script in (data_pipeline, modify_llm, train_llm)}
BLOCKS = {
    page: re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for page, text in TEXTS.items()
}


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


def command_lines(page):
    return [
        line
        for language, block in BLOCKS[page]
        if language == "bash"
        for line in block.splitlines()
    ]


def offline_commands():
    for line in command_lines(README):
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
    blocks = [block for language, block in BLOCKS[README] if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@functools.cache
def help_of(script):
    command = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_flags_of_the_measuring_commands_are_known():
    measuring = [*command_lines(README), *command_lines(MEASUREMENTS)]
    found = [(s, line) for line in measuring for s in re.findall(r"python (tests/\w+\.py)", line)]
    assert len(found) >= 6
    for script, line in found:
        for flag in re.findall(r"--\w+", line.partition(script)[2]):
            assert flag in help_of(script), (script, flag)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_every_flag_that_is_named_is_one(page):
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    others |= {"--index", "--dist"}  # pip's, pytest's
    others |= {"--number", "--seed", "--rates"}  # campaign.py's, measure.py's of another version
    known = {f"--{name}" for name in train_llm.DEFAULTS} | {"--plot", "--merge_to"}
    measuring = {script for script in re.findall(r"python (tests/\w+\.py)", TEXTS[page])}
    known |= {flag for script in measuring for flag in re.findall(r"--\w+", help_of(script))}
    assert not {*re.findall(r"(?<![\w-])--\w+", TEXTS[page])} - known - others


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", TEXTS[page], re.MULTILINE)
    }
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    assert links
    for target in links:
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_what_the_layout_and_the_readers_path_name_is_there():
    layout = TEXTS[README].partition("## How the code is laid out")[2].partition("\n## ")[0]
    spans = {*re.findall(r"`([\w./]+)`", layout)}
    files = {span for span in spans if span.endswith(".py")}
    assert len(files) > 5 and all((ROOT / file).exists() for file in files), files
    names = {span for span in spans - files if span.isidentifier()}
    assert len(names) > 20
    for name in names:
        assert any(hasattr(script, name) for script in SCRIPTS.values()), name


def texts_of(script):
    """The string literals of a script, what is filled in as dots."""
    for node in ast.walk(ast.parse(Path(script.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_of_the_table_of_errors_are_the_scripts():
    """The longest part of each without a value stands in one of them."""
    rows = TEXTS[README].partition("| message |")[2].partition("\n\n")[0].splitlines()[2:]
    texts = [text for script in SCRIPTS.values() for text in texts_of(script)]
    assert len(rows) >= 10
    for row in rows:
        message = re.match(r"\| `([^`]+)`", row)[1]
        parts = re.split(r"\.\.\.|\d+|--\w+|'\w+'|RANK=|, | is ", message)
        longest = max((part.strip(" :;") for part in parts), key=len)
        assert len(longest) > 8 and any(longest in text for text in texts), message
