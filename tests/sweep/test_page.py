"""docs/sweep.md says what was measured, and every command on it works as it stands."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from cli_runs import qlora
from swept import Sweep, Zoo

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sweep as bench  # noqa: E402 - a script beside the package, not in it

BLOCKS = re.findall(r"```(?:yaml|sh)?\n(.*?)```", bench.PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("qlora ")]


def test_the_table_is_drawn_from_the_results() -> None:
    text = bench.PAGE.read_text(encoding="utf-8")
    assert bench.drawn(text) == text


@pytest.mark.xdist_group("sweep")
def test_every_command_of_the_page_works(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sweep(zoo("llama"), tmp_path, "train.max_steps=1", "data.eval_fraction=0.2")
    (tmp_path / "variants.yaml").write_text(next(block for block in BLOCKS if block.startswith("small:")))
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        said = qlora(*shlex.split(command)[1:])
        assert said.code == 0, (command, said.err)
    assert (tmp_path / "two.html").exists() and (tmp_path / "runs" / "seeds" / "wide_seed-2" / "run.json").exists()
