"""A model comes from the hub once, with its tokenizer and nothing else, and a hub that is silent or lacks
it ends in one line.

    python -m pytest tests/techniques/test_model_hub.py
"""

import hashlib
import http.server
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from small_models import as_bin, logits, modified, peft_made, plain, refused

import modify_llm


def test_a_hub_that_never_answers_is_given_up_within_seconds(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        constants, template = (
            huggingface_hub.constants,
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        start = time.monotonic()
        message = refused(capsys, ["--model_name_or_path", "nobody/no-such-gpt2"])
    assert time.monotonic() - start < 15
    assert (
        "nobody/no-such-gpt2" in message and "timed out" in message and "local directory" in message
    )


@pytest.fixture
def hub(tmp_path, monkeypatch, base):
    """A hub on loopback that serves tmp_path/hub, and an empty cache.

    It holds someone/tiny (the base with a tokenizer's file, and an adapter beside it) and
    someone/tiny-bin (pytorch_model.bin alone).
    """
    root = tmp_path / "hub"
    for name in ("tiny", "tiny-bin"):
        shutil.copytree(base, root / "someone" / name)
        (root / "someone" / name / "tokenizer.json").write_text("{}")
    as_bin(root / "someone" / "tiny-bin")
    (root / "someone" / "tiny" / "adapter_config.json").write_text("{}")

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", headers=()):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[0] == "api":
                directory = root / "/".join(parts[2:4])
                if not directory.is_dir():
                    return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
                files = [file for file in directory.iterdir() if file.is_file()]
                if "tree" in parts:
                    content = [
                        {"type": "file", "oid": "b" * 40, "size": f.stat().st_size, "path": f.name}
                        for f in files
                    ]
                else:
                    siblings = [{"rfilename": file.name} for file in files]
                    content = {"id": "/".join(parts[2:4]), "sha": "a" * 40, "siblings": siblings}
                return self.reply(
                    200, json.dumps(content).encode(), {"Content-Type": "application/json"}
                )
            file = root / parts[0] / parts[1] / parts[-1]
            if not file.is_file():
                return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
            return self.reply(200, content, etag)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield root
    server.shutdown()
    server.server_close()


def unreachable(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["someone/tiny", "someone/tiny-bin"])
def test_a_model_comes_from_the_hub_once_with_its_tokenizer_and_nothing_else(
    hub, base, monkeypatch, name
):
    assert torch.equal(logits(modified(name)), logits(plain(base)))
    unreachable(monkeypatch)
    assert torch.equal(logits(modified(name)), logits(plain(base)))
    files = {file.name for file in Path(modify_llm.locate(name)).iterdir()}
    weights = "pytorch_model.bin" if name.endswith("bin") else "model.safetensors"
    assert files == {"config.json", "tokenizer.json", weights}


@pytest.mark.parametrize("cached", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_repository_of_which_the_cache_holds_a_part_is_completed_or_refused(
    hub, base, monkeypatch, caplog, cached
):
    huggingface_hub.hf_hub_download("someone/tiny", cached, cache_dir=hub.parent / "cache")
    with monkeypatch.context() as offline:
        unreachable(offline)
        with pytest.raises(
            ValueError, match=r"^--model_name_or_path someone/tiny: holds n"
        ) as error:
            modified("someone/tiny")
        assert "\n" not in str(error.value) and "only what the cache holds" in caplog.text
    assert torch.equal(logits(modified("someone/tiny")), logits(plain(base)))


def test_a_cached_model_whose_vocabulary_is_not_cached_asks_the_hub_and_goes_on_without_it(
    hub, base, monkeypatch
):
    for file in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("someone/tiny", file, cache_dir=hub.parent / "cache")
    with monkeypatch.context() as offline:
        unreachable(offline)
        assert torch.equal(logits(modified("someone/tiny")), logits(plain(base)))
    assert (Path(modify_llm.locate("someone/tiny")) / "tokenizer.json").exists()


def test_a_repository_that_is_not_on_the_hub_is_refused(hub):
    with pytest.raises(ValueError, match="someone/absent: neither a local directory nor"):
        modified("someone/absent")


def test_a_repository_or_directory_that_holds_an_adapter_alone_is_told_for_what_it_is(
    hub, base, tmp_path
):
    peft_made(base, tmp_path / "peft")
    with pytest.raises(
        ValueError, match=r"holds no config\.json; it is an adapter, .*--adapter_path"
    ):
        modified(str(tmp_path / "peft"))
    shutil.copytree(tmp_path / "peft", hub / "someone" / "adapter")
    with pytest.raises(ValueError, match=r"someone/adapter: holds no config\.json"):
        modified("someone/adapter")
