"""Datasets of the hub and files behind a URL give the rows that a local copy gives, or one line says
why not.

    python -m pytest tests/pipeline/test_hub_datasets.py
"""

import functools
import gzip
import http.server
import json
import threading
from pathlib import Path

import pytest
from row_files import EVERY_KIND, ROWS, alpaca_row, as_jsonl, as_parquet, run_script

import data_pipeline
from data_pipeline import load_dataset


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The test's directory over http: web("rows.json") -> its URL. `/cut.json` breaks off
    at the end of a line.
    """
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/cut.json":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(as_jsonl([alpaca_row()]))

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield functools.partial("http://127.0.0.1:{}/{}".format, server.server_port)
        server.shutdown()


class Hub(http.server.BaseHTTPRequestHandler):
    """Datasets in `root` as the hub serves them: their commit, their files, a file."""

    root, commit = Path(), "a" * 40

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        listing = parts[:2] == ["api", "datasets"]
        repository = "/".join(parts[2:4] if listing else parts[1:3])
        path = self.root.joinpath(repository, *([] if listing else parts[5:]))
        if not path.exists():
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if not listing:
            content = path.read_bytes()
            return self.answer(200, content, {"ETag": f'"{hash(content)}"'})
        answer = {"id": repository, "sha": self.commit, "siblings": []}
        if parts[4] == "tree":
            files = sorted(file for file in path.rglob("*") if file.is_file())
            names = [file.relative_to(path).as_posix() for file in files]
            answer = [{"type": "file", "path": name, "oid": "b" * 40, "size": 1} for name in names]
        return self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def answer(self, status, body, headers):
        self.send_response(status)
        headers |= {"X-Repo-Commit": self.commit, "Content-Length": len(body)}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(directory, tmp_path):
    """A hub on loopback that serves one dataset, `someone/alpaca`.

    hub(*flags, **environment) -> what the script leaves, and says, with that hub.
    """
    parts = {f"train-0000{i}-of-00002.parquet": as_parquet(ROWS[i::2]) for i in range(2)}
    files = {f"data/{name}": content for name, content in parts.items()}
    files |= {"data/test-00000-of-00001.parquet": as_parquet(ROWS[:3]), "README.md": b"..."}
    files |= {"rows.csv": ROWS, "dataset_infos.json": b"{}"}
    directory({f"someone/alpaca/{name}": content for name, content in files.items()})
    handler = type("Hub", (Hub,), {"root": tmp_path / "files"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "*",
        }
        script = functools.partial(run_script, "--num_workers", 0, cwd=tmp_path)
        yield lambda *flags, **changes: script(*flags, **environment | changes)
        server.shutdown()


def test_a_hub_dataset_is_the_parquet_files_of_its_training_split(hub):
    """Downloaded once, without a line of an HTTP client; the cache serves it where the hub does
    not answer."""
    for environment in ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        status, out, err = hub("--dataset_path", "someone/alpaca", **environment)
        assert (status, err) == (0, "")
        names = "data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet"
        assert f"Files of someone/alpaca: {names}\n" in out
        assert f"Dataset loaded successfully with {len(ROWS)} entries." in out
        assert not [line for line in out.splitlines() if "http" in line.lower()]
    status, out, err = hub("--eval_dataset_path", "someone/alpaca", HF_HUB_OFFLINE="1")
    assert (status, err) == (0, "") and "Held out: 3 rows" in out


def test_one_of_several_configurations_of_a_hub_dataset_is_chosen(monkeypatch, directory, tmp_path):
    readme = b"""---
configs:
- {config_name: de, data_files: de/*.parquet}
- {config_name: en, data_files: [{split: train, path: en/*.parquet}]}
---"""
    files = {f"{name}/rows.parquet": as_parquet(ROWS[:n]) for name, n in (("de", 2), ("en", 3))}
    directory(files | {"README.md": readme})
    monkeypatch.setattr(data_pipeline, "hub_snapshot", lambda *_: str(tmp_path / "files"))
    with pytest.raises(ValueError, match=r"someone/two: --dataset_config None: .*\['de', 'en'\]"):
        load_dataset("someone/two")
    with pytest.raises(ValueError, match=r"--dataset_config fr: .*\['de', 'en'\]"):
        load_dataset("someone/two", dataset_config="fr")
    assert len(load_dataset("someone/two", dataset_config="en")) == 3
    assert len(load_dataset("someone/two", dataset_config="de")) == 2


@pytest.mark.parametrize(
    "dataset, environment, reason",
    [
        ("someone/nothing", {}, "404"),
        ("someone/alpaca", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connect"),
    ],
)
def test_a_hub_dataset_out_of_reach_is_refused_in_one_line(hub, dataset, environment, reason):
    status, out, err = hub("--dataset_path", dataset, **environment)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and reason in err
    assert err.startswith(f"data_pipeline.py: error: --dataset_path {dataset}: neither a local ")


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.parquet"])
def test_a_url_may_name_any_kind_of_file(write, web, tokenizer, name):
    kind = ".csv" if "csv" in name else ".parquet"
    content = EVERY_KIND[kind](ROWS)
    write(gzip.compress(content) if name.endswith(".gz") else content, name)
    assert len(load_dataset(web(name), tokenizer)) == len(ROWS)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_url_gives_the_rows_of_its_file(write, web, tokenizer, name):
    local = load_dataset(write(ROWS, name), tokenizer)
    assert (
        load_dataset(web(f"{name}?download=true"), tokenizer).content_hash() == local.content_hash()
    )


@pytest.mark.parametrize("path", ["missing.json", "cut.json", "with space.json"])
def test_a_url_that_cannot_be_read_is_refused(refused, web, path):
    assert refused("--dataset_path", web(path)).startswith(f"--dataset_path {web(path)}: ")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port/rows.json", "http:///rows.json", "http://[::1/rows.json"]
)
def test_a_malformed_url_is_refused(refused, url):
    assert refused("--dataset_path", url).startswith(f"--dataset_path {url}: ")
