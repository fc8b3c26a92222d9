"""Every command in the documentation is run, or parsed by the real command line if it needs a GPU or another tool."""

import json
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
from support.command_line import CommandResult, qlora
from support.documents import DOCUMENTS, ROOT, fences

from qlora.cli.app import app

DEMO = ROOT / "qlora" / "demo"
RUN, PARSED, LANGUAGES = "sh", {"gpu", "tool"}, {"python", "yaml", "json", "text"}
PROGRAMS = {
    "qlora",
    "accelerate",
    "make",
    "pip",
    "python",
    "vllm",
    "ollama",
    "curl",
    "llama-server",
    "llama-quantize",
    "mlx_lm.generate",
}


class Command(NamedTuple):
    """One line of a fenced block: file and line, the block's mark, the words of the command."""

    where: str
    mark: str
    words: tuple[str, ...]


def commands() -> Iterator[Command]:
    """Every line of a fenced block without a language, or marked sh, gpu or tool."""
    for document in DOCUMENTS:
        for fence in fences(document):
            mark = fence.words[0] if fence.words else ""
            if mark in LANGUAGES or "├──" in fence.text:
                continue
            for line in fence.text.replace("\\\n", " ").splitlines():  # a backslash joins two lines
                if line.strip() and not line.startswith("#"):
                    yield Command(fence.where, mark, tuple(shlex.split(line, comments=True)))


COMMANDS = [*commands()]


def label(command: Command) -> str:
    return f"{command.where} {' '.join(command.words)[:60]}"


@pytest.mark.parametrize("command", COMMANDS, ids=label)
def test_a_command_is_known_and_its_block_is_marked(command: Command) -> None:
    assert command.words[0] in PROGRAMS, "unknown program; a block that holds no commands needs a language"
    assert command.mark in {"", RUN, *PARSED}
    if command.words[0] in ("vllm", "ollama", "curl", "llama-server", "llama-quantize", "mlx_lm.generate"):
        assert command.mark == "tool"
    if command.mark == "":
        assert command.words[0] == "make", "neither run by a test nor marked: sh, gpu or tool"
    if command.mark == RUN:
        assert command.where.startswith(("docs/served.md", "docs/sweep.md", "docs/add-a-kind.md")), (
            "no test runs this document"
        )


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.mark != "tool"], ids=label)
def test_a_command_is_valid(command: Command) -> None:
    """Its targets are in the Makefile, its scripts in the tree, its subcommands and options on the command line."""
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
        parse(words[words.index("qlora") + 1 :] if program == "accelerate" else words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_command_in_the_text_is_valid(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`qlora ([a-z][^`\n]*)`", text):
        parse(shlex.split(span), complete=False)


def parse(words: Sequence[str], complete: bool = True) -> None:
    """Parse a command line as `qlora` does, without running it. `complete`: required arguments must be there."""
    group = typer.main.get_command(app)
    name, *rest = words
    command = group.commands[name]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    if complete:
        context = command.make_context(name, list(rest), resilient_parsing=False)
        for word in context.args:
            assert "=" in word, f"{word} is no override"
        return
    known = {option for parameter in command.params for option in parameter.opts}
    options = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert options <= {*known, "--help"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the documents' names of model and data are the demo's base and a part of its data.

    The base is float32: on a CPU without bfloat16 instructions its matrix products are up to a hundred times faster.
    """
    folder = tmp_path_factory.mktemp("workspace")
    base = Path(shutil.copytree(DEMO / "base", folder / "Qwen" / "Qwen3-0.6B"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    (folder / "data").mkdir()
    lines = (DEMO / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data" / "train.jsonl").write_text("".join(lines[:12]))
    return folder


RUNNABLE = [command for command in COMMANDS if command.mark == RUN]


def test_the_guide_to_a_served_model_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    for command in (command for command in RUNNABLE if command.where.startswith("docs/served.md")):
        if command.words[0] == "pip":
            continue  # this environment has it installed already
        result = run(command.words)
        assert result.code == 0, f"{label(command)}: {result.err[-1500:]}"
    assert (workspace / "merged" / "certificate.json").is_file()
    assert (workspace / "for-ollama" / "Modelfile").is_file()
    assert (workspace / "portable" / "adapter_model.safetensors").is_file()
    assert (workspace / "runs" / "my" / "report.html").is_file()


@pytest.mark.slow  # tests/docs/test_sweep_page.py runs the page in one process
def test_the_page_on_sweeps_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "sweep.md"
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {DEMO / 'base'}, dtype: float32}}\n"
        f"data: {{train: {DEMO / 'data' / 'eval.jsonl'}, max_length: 128, packing: false, eval_fraction: 0.1}}\n"
        "optim: {kind: adamw}\ntrain: {max_steps: 1, global_batch: 2}\n"
    )
    (variants,) = (fence.text for fence in fences(page) if fence.words == ("yaml",))
    (tmp_path / "variants.yaml").write_text(variants)
    for command in (command for command in RUNNABLE if command.where.startswith("docs/sweep.md")):
        result = run(command.words)
        assert result.code == 0, f"{label(command)}: {result.err[-1500:]}"
    assert (tmp_path / "two.html").is_file() and (tmp_path / "runs" / "seeds").is_dir()


def run(words: Sequence[str]) -> CommandResult:
    """Run a command of a document; `qlora` commands run in this process."""
    if words[0] == "qlora":
        return qlora(*words[1:])
    process = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return CommandResult(process.returncode, process.stdout, process.stderr)
