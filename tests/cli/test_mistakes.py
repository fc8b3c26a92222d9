"""Mistakes of users: one clear line and exit code 2, never a stack trace; the help of every command has an example."""

import resource
import subprocess
import sys

import pytest
import typer
from support.command_line import qlora

from qlora.cli.app import app

WRONG = [
    ("trian", "recipe.yaml"),
    ("train",),
    ("train", "nowhere.yaml"),
    ("train", "recipe.yaml", "adapter.rnak=3"),
    ("train", "recipe.yaml", "adapter.rank=many"),
    ("train", "recipe.yaml", "adapter.rank"),
    ("train", "recipe.yaml", "quant.kind=nf5"),
    ("check", "."),
    ("check", "broken.yaml"),
    ("preview", "recipe.yaml", "-n", "0"),
    ("plan", "recipe.yaml", "--gpu", "big"),
    ("plan", "recipe.yaml", "--gpus", "none"),
    ("recipes", "show", "24gb-lama"),
    ("recipes", "copy", "24gb-llama3.1-8b", "recipe.yaml"),
    ("generate", "nowhere"),
    ("export", "nowhere"),
    ("resize", "nowhere", "out", "--rank", "0"),
    ("convert", "nowhere.yml"),
    ("convert", "recipe.yaml"),
    ("report", "nowhere"),
    ("report",),
    ("doctor", "--jsno"),
    ("sweep", "recipe.yaml"),
    ("sweep", "recipe.yaml", "quant.kind=nf4,fp4"),
    ("sweep", "recipe.yaml", "adapter.rank=1,2", "--variants", "nowhere.yaml"),
    ("init", "--model", "no-user/no-model", "--data", "rows.jsonl", "-o", "recipe.yaml"),
    ("init", "--model", "no-user/no-model", "--data", "rows.jsonl", "--gpu", "big"),
    ("init", "--model", "nowhere", "--data", "rows.jsonl"),
    ("advise", "nowhere.yaml"),
    ("advise", "."),
    ("advise", "recipe.yaml", "--rows", "-1"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: no-user/no-model\ndata: {train: rows.jsonl}\n")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    result = qlora(*arguments)
    assert result.code == 2 and result.out == ""
    errors = [line for line in result.err.splitlines() if line.strip() and line not in ("ok",)]
    assert len([line for line in errors if not line.startswith("not ok")]) == 1, result.err
    assert "Traceback" not in result.err and "a bug in qlora" not in result.err


def test_the_help_of_every_command_has_an_example():
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for subcommand in getattr(command, "commands", {"": command}).values():
            assert "Example: qlora " + name in (subcommand.help or ""), name


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from qlora.cli.app import run; run(['--help']); print(sorted({'torch', 'numpy'} & {*sys.modules}))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", f"import qlora.cli; {code}"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.endswith("[]\n") and "Usage: qlora" in result.stdout
    # Processor time, not the clock: other tests run at the same time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
