"""`qlora push` against a local hub: private by default, one commit of the right files, the token in no message."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.command_line import CommandResult, qlora
from support.small_runs import recipe_of, run, write_records

Zoo = Callable[..., Path]
TOKEN = "hf_" + "aZ09" * 8


class LocalHub:
    """The part of the hub's protocol that a commit of small files needs; records the requests."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.public, self.error_status = False, 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("Authorization"))
                refused = {"error": "no"} if hub.error_status else None
                self.reply(hub.error_status or 200, refused or hub.answer(self.path, body))

            def do_GET(self) -> None:
                self.reply(200, {"id": "me/mine", "private": not hub.public, "siblings": [], "tags": []})

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
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/me/mine"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"success": True, "commitUrl": f"{self.url}/me/mine/commit/1", "commitOid": "1", "hookOutput": ""}
        return {"errors": [], "warnings": []}


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("push")
    run(recipe_of(zoo("llama"), write_records(parent / "records.jsonl", 8), parent / "run", "train.max_steps=1"))
    return parent / "run"


@pytest.fixture(autouse=True)
def only_the_local_hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads its environment at import, so its settings are set, not the variables."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")


def push(*arguments: object) -> CommandResult:
    return qlora("push", *arguments)


def test_a_push_is_private_complete_and_never_shows_the_token(hub: LocalHub, folder: Path) -> None:
    result = push(folder, "me/mine", "--base", "their/base", "--json")
    assert result.code == 0, result.err
    assert [repository["visibility"] for repository in hub.created] == ["private"] and hub.tokens == {f"Bearer {TOKEN}"}
    assert json.loads(result.out)["url"].endswith("/me/mine/commit/1") and json.loads(result.out)["private"] is True
    sent = {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"}
    assert sent <= hub.files.keys() and hub.files.keys().isdisjoint({"recipe.yaml", "run.json", "report.html"})
    for name in hub.files.keys() - {"adapter_config.json"}:
        assert hub.files[name] == (folder / name).read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "their/base"
    contents = "".join(map(repr, hub.files.values()))
    assert TOKEN not in result.out + result.err + contents and str(folder.parent) not in contents


def test_a_push_to_a_public_repository_needs_the_public_option(hub: LocalHub, folder: Path) -> None:
    hub.public = True
    result = push(folder, "me/mine", "--base", "their/base")
    assert result.code == 2 and "exists and is public" in result.err and not hub.files
    result = push(folder, "me/mine", "--base", "their/base", "--public")
    assert result.code == 0 and hub.files and hub.created[-1]["visibility"] == "public"


def test_a_merged_model_is_pushed_as_a_model(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    assert qlora("export", folder, tmp_path / "merged", "--to", "merged", "--rows", 0).code == 0
    result = push(tmp_path / "merged", "me/mine")
    assert result.code == 0, result.err
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= hub.files.keys()


def test_a_local_base_with_a_name_like_one_on_the_hub_is_not_pushed(
    hub: LocalHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "runs" / "a"
    adapter.mkdir(parents=True)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "models/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    (tmp_path / "models" / "base").mkdir(parents=True)
    for here in (tmp_path, tmp_path / "models"):
        monkeypatch.chdir(here)
        result = push(adapter, "me/mine")
        assert result.code == 2 and "a path on this machine" in result.err and not hub.files, result.err


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one_line_without_the_token(hub: LocalHub, folder: Path, status: int) -> None:
    hub.error_status = status
    result = push(folder, "me/mine", "--base", "their/base")
    assert result.code == 2 and result.err.count("error:") == 1
    assert str(status) in result.err and TOKEN not in result.err and "Traceback" not in result.err


def test_invalid_requests_are_refused_before_anything_is_sent(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    cases = (
        ((folder, "me/mine"), "--base OWNER/NAME"),
        ((tmp_path, "me/mine"), "no adapter and no model"),
        ((folder, "not a name", "--base", "a/b"), "USER/NAME"),
    )
    for arguments, message in cases:
        result = push(*arguments)
        assert result.code == 2 and message in result.err and not hub.created and not hub.files
