"""Pushing: private by default, one commit of what belongs there, no token in sight; against a hub that runs here."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("push")
TOKEN = "hf_" + "aZ09" * 8


class Hub:
    """As much of the hub's protocol as a commit of small files needs; remembers what it was told."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.public, self.refuses = False, 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("Authorization"))
                self.reply(hub.refuses or 200, {"error": "no"} if hub.refuses else hub.answer(self.path, body))

            def do_GET(self) -> None:
                found = {"id": "me/mine", "private": not hub.public, "siblings": [], "tags": []}
                self.reply(200, found)

            def reply(self, status: int, value: Any) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/me/mine"}
        if "/preupload/" in path:
            names = [each["path"] for each in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"success": True, "commitUrl": f"{self.url}/me/mine/commit/1", "commitOid": "1", "hookOutput": ""}
        return {"errors": [], "warnings": []}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push")
    run(recipe_of(zoo("llama"), write_rows(place / "rows.jsonl", 8), place / "run", "train.max_steps=1"))
    return place / "run"


def push(hub: Hub, *arguments: object, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """`qlora push` in a process that knows no other hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "qlora", "push", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_it_is_private_whole_and_keeps_the_token_to_itself(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, "me/mine", "--base", "their/base", "--json")
    assert done.returncode == 0, done.stderr
    assert [each["visibility"] for each in hub.created] == ["private"] and hub.tokens == {f"Bearer {TOKEN}"}
    assert json.loads(done.stdout)["url"].endswith("/me/mine/commit/1") and json.loads(done.stdout)["private"] is True
    sent = {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"}
    assert sent <= hub.files.keys() and hub.files.keys().isdisjoint({"recipe.yaml", "run.json", "report.html"})
    for name in hub.files.keys() - {"adapter_config.json"}:
        assert hub.files[name] == (folder / name).read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "their/base"
    said = done.stdout + done.stderr + "".join(map(repr, hub.files.values()))
    assert TOKEN not in said and str(folder.parent) not in "".join(map(repr, hub.files.values()))


@pytest.mark.slow
def test_public_only_when_asked_also_where_the_repository_is_there(hub: Hub, folder: Path) -> None:
    hub.public = True
    done = push(hub, folder, "me/mine", "--base", "their/base")
    assert done.returncode == 2 and "everybody can read it" in done.stderr and not hub.files
    done = push(hub, folder, "me/mine", "--base", "their/base", "--public")
    assert done.returncode == 0 and hub.files and hub.created[-1]["visibility"] == "public"


def test_a_model_goes_as_a_model(hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert qlora("export", folder, tmp_path / "merged", "--to", "merged", "--rows", 0).code == 0
    done = push(hub, tmp_path / "merged", "me/mine")
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= hub.files.keys()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one_line_without_the_token(hub: Hub, folder: Path, status: int) -> None:
    hub.refuses = status
    done = push(hub, folder, "me/mine", "--base", "their/base")
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert str(status) in done.stderr and TOKEN not in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_meant_is_refused_before_anything_is_sent(hub: Hub, folder: Path, tmp_path: Path) -> None:
    for words, told in (((folder, "me/mine"), "--base OWNER/NAME"), ((tmp_path, "me/mine"), "no adapter and no model"),
                        ((folder, "not a name", "--base", "a/b"), "USER/NAME")):  # fmt: skip
        done = push(hub, *words)
        assert done.returncode == 2 and told in done.stderr and not hub.created and not hub.files
