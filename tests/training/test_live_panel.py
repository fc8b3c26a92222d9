"""While it runs: a calm panel on a terminal, plain lines in a pipe, and Ctrl-C explained once."""

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console
from support.documents import ROOT
from support.small_runs import recipe_of, write_rows

from qlora.recipe.recipe import dump
from qlora.training.live_panel import STOPPING, Panel
from qlora.training.run_log import CTRL_C
from qlora.utils.progress import ProgressReporter, clock

LINE = {
    "step": 120,
    "loss": 1.2345,
    "learning_rate": 2e-4,
    "grad_norm": 0.31,
    "tokens_per_second": 5432.1,
    "peak_bytes": 3 * 2**30,
}


def shown(width: int, stopping: bool = False) -> str:
    """The panel after a step and two evaluations, as a terminal of this width has it."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    panel = Panel(console, 1000, 4 * 2**30, lambda: stopping)
    panel.train(LINE | {"step": 100})
    for step, loss in ((50, 1.5), (100, 1.6)):
        panel.evaluation({"step": step, "eval_loss": loss})
    panel.train(LINE)
    panel.working("evaluating: 40 % of 200 rows, 8 rows/s, 0:15 left")
    console.print(panel.render())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_panel_says_how_far_how_good_how_fast_and_how_much_memory() -> None:
    text = shown(100)
    for part in ("120 of 1,000", "12 %", "left", "1.2345", "2.00e-04", "5,432 tokens/s", "3.00 GiB", "4.00 GiB planned",
                 "1.6000 at step 100", "best 1.5000 at step 50", "evaluating: 40 %"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_none_is_wrapped(width: int) -> None:
    lines = shown(width, stopping=True).rstrip("\n").split("\n")
    assert all(len(line) <= width for line in lines) and len(lines) <= (7 if width < 60 else 5)


def test_a_signal_is_answered_in_the_panel() -> None:
    assert STOPPING in shown(80, stopping=True) and STOPPING not in shown(80)


@pytest.mark.parametrize(
    ("done", "total", "unit", "said"),
    [
        (600, None, "rows", "work: 600 rows done, 60 rows/s"),
        (600, 1200, "rows", "work: 50 % of 1,200 rows, 60 rows/s, 0:10 left"),
        (5 * 10**9, 20 * 10**9, "bytes", "work: 25 % of 20.0 GB, 500 MB/s, 0:30 left"),
    ],
)
def test_a_rate_has_its_unit(done: int, total: int, unit: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr("qlora.utils.progress.time.monotonic", lambda: now[0])
    told = ProgressReporter(lines.append, "work", unit)
    told(1, total)
    now[0] = 10.0
    told(done, total)
    assert lines == [said]
    assert [clock(each) for each in (7, 754, 10930)] == ["0:07", "12:34", "3:02:10"]


def test_on_a_terminal_a_run_shows_the_panel_and_explains_ctrl_c_once(zoo, tmp_path: Path) -> None:
    recipe = recipe_of(zoo("llama"), write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    text = on_a_terminal(["train", str(tmp_path / "recipe.yaml")], tmp_path)
    assert text.count(CTRL_C) == 1 and "tokens/s" in text and "GiB planned" in text
    assert "done: 6 steps" in text and "\x1b[?25h" in text  # the cursor is back
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def on_a_terminal(words: list[str], folder: Path) -> str:
    """What a terminal of 100 columns gets to see of `qlora WORDS`."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "qlora", *words], stdin=slave, stdout=slave, stderr=slave, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(slave)
    found = b""
    while select.select([master], [], [], 120)[0]:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        found += piece
    os.close(master)
    assert child.wait(30) == 0, found.decode(errors="replace")[-2000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", found.decode(errors="replace"))
