"""docs/sweep.md shows the measured results, and all of its commands work."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from support.command_line import qlora
from support.paths import BENCHMARKS
from support.sweeps import Sweep, Zoo

sys.path.insert(0, str(BENCHMARKS))

import sweep as bench

BLOCKS = re.findall(r"```(?:yaml|sh)?\n(.*?)```", bench.PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("qlora ")]


def test_the_table_is_drawn_from_the_results() -> None:
    text = bench.PAGE.read_text(encoding="utf-8")
    assert bench.redraw(text) == text


@pytest.mark.xdist_group("sweep")
def test_every_command_on_the_page_works(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sweep(zoo("llama"), tmp_path, "train.max_steps=1", "data.eval_fraction=0.2", "data.train_on=all")
    (tmp_path / "variants.yaml").write_text(next(block for block in BLOCKS if block.startswith("small:")))
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        result = qlora(*shlex.split(command)[1:])
        assert result.code == 0, (command, result.err)
    assert (tmp_path / "two.html").exists() and (tmp_path / "runs" / "seeds" / "wide_seed-2" / "run.json").exists()
