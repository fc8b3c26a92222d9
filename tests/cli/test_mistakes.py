"""A user's mistake is a clear line and exit code 2, never a stack trace; every verb shows how it is called."""

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
    ("init", "--model", "nobody/nothing", "--data", "rows.jsonl", "-o", "recipe.yaml"),
    ("init", "--model", "nobody/nothing", "--data", "rows.jsonl", "--gpu", "big"),
    ("init", "--model", "nowhere", "--data", "rows.jsonl"),
    ("advise", "nowhere.yaml"),
    ("advise", "."),
    ("advise", "recipe.yaml", "--rows", "-1"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: nobody/nothing\ndata: {train: rows.jsonl}\n")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    said = qlora(*arguments)
    assert said.code == 2 and said.out == ""
    errors = [line for line in said.err.splitlines() if line.strip() and line not in ("ok",)]
    assert len([line for line in errors if not line.startswith("not ok")]) == 1, said.err
    assert "Traceback" not in said.err and "qlora's mistake" not in said.err


def test_every_verbs_help_shows_an_example():
    group = typer.main.get_command(app)
    for name, verb in group.commands.items():  # type: ignore[attr-defined]
        for each in getattr(verb, "commands", {"": verb}).values():
            assert "Example: qlora " + name in (each.help or ""), name


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = (
        "import sys; from qlora.cli.app import run; run(['--help']); print(sorted({'torch', 'numpy'} & {*sys.modules}))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(
        [sys.executable, "-c", f"import qlora.cli; {code}"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.stdout.endswith("[]\n") and "Usage: qlora" in found.stdout
    # Of the processor, not of the clock: other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
