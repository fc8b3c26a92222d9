"""Every command that README and docs show is run, or parsed for real and marked as needing a card or another tool."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from support.command_line import Said, qlora
from support.documents import DOCUMENTS, ROOT, fences

from qlora.cli.app import app

DEMO = ROOT / "qlora" / "demo"
RUN, MARKED, SAYS = "sh", {"card", "tool"}, {"python", "yaml", "json", "text"}
PROGRAMS = {"qlora", "accelerate", "make", "pip", "python", "vllm", "ollama", "curl", "llama-server", "llama-quantize"}


class Command(NamedTuple):
    """One line of a fence: where it stands, the fence's mark, its words."""

    where: str
    mark: str
    words: tuple[str, ...]


def commands() -> Iterator[Command]:
    """Every line of a fence without a language, or marked sh, card or tool."""
    for document in DOCUMENTS:
        for fence in fences(document):
            mark = fence.words[0] if fence.words else ""
            if mark in SAYS or "├──" in fence.text:
                continue
            for line in fence.text.replace("\\\n", " ").splitlines():  # a backslash joins two lines
                if line.strip() and not line.startswith("#"):
                    yield Command(fence.where, mark, tuple(shlex.split(line, comments=True)))


COMMANDS = [*commands()]


def ident(command: Command) -> str:
    return f"{command.where} {' '.join(command.words)[:60]}"


@pytest.mark.parametrize("command", COMMANDS, ids=ident)
def test_a_command_is_known_and_its_fence_is_marked(command: Command) -> None:
    assert command.words[0] in PROGRAMS, "what is this? A fence that is no command has a language"
    assert command.mark in {"", RUN, *MARKED}
    if command.words[0] in ("vllm", "ollama", "curl", "llama-server", "llama-quantize"):
        assert command.mark == "tool"
    if command.mark == "":
        assert command.words[0] == "make", "neither run by a test nor marked: sh, card or tool"
    if command.mark == RUN:
        assert command.where.startswith(("docs/served.md", "docs/sweep.md", "docs/add-a-kind.md")), (
            "no test runs this document"
        )


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.mark != "tool"], ids=ident)
def test_a_command_can_be_meant(command: Command) -> None:
    """Targets exist in the Makefile, scripts in the tree, verbs and flags on the command line."""
    program, *words = command.words
    if program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert {*words} <= targets
    elif program == "python":
        scripts = [word for word in words if word.endswith(".py")]
        assert words[:2] == ["-m", "pytest"] or scripts
        assert all((ROOT / script).exists() for script in scripts)
    elif program == "pip":
        assert words == ["install", "."]
    else:
        parsed(words[words.index("qlora") + 1 :] if program == "accelerate" else words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_command_in_the_text_can_be_meant(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`qlora ([a-z][^`\n]*)`", text):
        parsed(shlex.split(span), whole=False)


def parsed(words: Sequence[str], whole: bool = True) -> None:
    """Parse a command line as `qlora` does, without running it. `whole`: nothing that it needs may be missing."""
    group = typer.main.get_command(app)
    verb, *rest = words
    command = group.commands[verb]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):
        verb, *rest = rest
        command = command.commands[verb]
    if whole:
        context = command.make_context(verb, list(rest), resilient_parsing=False)
        for word in context.args:
            assert "=" in word, f"{word} is no override"
        return
    flags = {flag for parameter in command.params for flag in parameter.opts}
    named = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert named <= {*flags, "--help"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the names of the documents stand for the demo's base and rows."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("Qwen/Qwen3-0.6B",):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(DEMO / "base", folder / name)
    (folder / "data").mkdir()
    lines = (DEMO / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data" / "train.jsonl").write_text("".join(lines[:160]))
    return folder


RUNNABLE = [each for each in COMMANDS if each.mark == RUN]


def test_the_guide_to_a_served_model_runs_as_it_stands(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in (each for each in RUNNABLE if each.where.startswith("docs/served.md")):
        if command.words[0] == "pip":
            continue  # `make test` has installed it, or this test would not run
        said = run(command.words)
        assert said.code == 0, f"{ident(command)}: {said.err[-1500:]}"
    assert (workplace / "merged" / "certificate.json").is_file()
    assert (workplace / "for-ollama" / "Modelfile").is_file()
    assert (workplace / "portable" / "adapter_model.safetensors").is_file()
    assert (workplace / "runs" / "my" / "report.html").is_file()


@pytest.mark.slow  # tests/docs/test_sweep_page.py runs the page in one process
def test_the_page_on_sweeps_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "sweep.md"
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {DEMO / 'base'}, dtype: float32}}\n"
        f"data: {{train: {DEMO / 'data' / 'eval.jsonl'}, max_length: 128, packing: false, eval_fraction: 0.1}}\n"
        "optim: {kind: adamw}\ntrain: {max_steps: 1, global_batch: 2}\n"
    )
    (variants,) = (fence.text for fence in fences(page) if fence.words == ("yaml",))
    (tmp_path / "variants.yaml").write_text(variants)
    for command in (each for each in RUNNABLE if each.where.startswith("docs/sweep.md")):
        said = run(command.words)
        assert said.code == 0, f"{ident(command)}: {said.err[-1500:]}"
    assert (tmp_path / "two.html").is_file() and (tmp_path / "runs" / "seeds").is_dir()


def run(words: Sequence[str]) -> Said:
    """A command of a document, in this process where it is ours."""
    if words[0] == "qlora":
        return qlora(*words[1:])
    done = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return Said(done.returncode, done.stdout, done.stderr)
