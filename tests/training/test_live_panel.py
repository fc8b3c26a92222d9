"""A run on a terminal: the live panel, progress lines, and Ctrl-C explained once."""

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console
from support.child_processes import Child, Notify
from support.small_runs import recipe_of, write_records

from qlora.cli.app import run as run_cli
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


def rendered(width: int, stopping: bool = False) -> str:
    """The panel after a step and two evaluations, on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    panel = Panel(console, 1000, 4 * 2**30, lambda: stopping)
    panel.update_step(LINE | {"step": 100})
    for step, loss in ((50, 1.5), (100, 1.6)):
        panel.update_evaluation({"step": step, "eval_loss": loss})
    panel.update_step(LINE)
    panel.update_status("evaluating: 40 % of 200 sequences, 8 sequences/s, 0:15 left")
    console.print(panel.render())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_panel_shows_progress_losses_speed_and_memory() -> None:
    text = rendered(100)
    for part in ("120 of 1,000", "12 %", "left", "1.2345", "2.00e-04", "5,432 tokens/s", "3.00 GiB", "4.00 GiB planned",
                 "1.6000 at step 100", "best 1.5000 at step 50", "evaluating: 40 %"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_or_wrapped(width: int) -> None:
    lines = rendered(width, stopping=True).rstrip("\n").split("\n")
    assert all(len(line) <= width for line in lines) and len(lines) <= (7 if width < 60 else 5)


def test_the_panel_shows_that_a_signal_was_received() -> None:
    assert STOPPING in rendered(80, stopping=True) and STOPPING not in rendered(80)


@pytest.mark.parametrize(
    ("done", "total", "unit", "line"),
    [
        (600, None, "records", "work: 600 records done, 60 records/s"),
        (600, 1200, "records", "work: 50 % of 1,200 records, 60 records/s, 0:10 left"),
        (5 * 10**9, 20 * 10**9, "bytes", "work: 25 % of 20.0 GB, 500 MB/s, 0:30 left"),
    ],
)
def test_progress_has_its_unit(done: int, total: int, unit: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr("qlora.utils.progress.time.monotonic", lambda: now[0])
    report = ProgressReporter(lines.append, "work", unit)
    report(1, total)
    now[0] = 10.0
    report(done, total)
    assert lines == [line]
    assert [clock(seconds) for seconds in (7, 754, 10930)] == ["0:07", "12:34", "3:02:10"]


def test_a_run_on_a_terminal_shows_the_panel_and_explains_ctrl_c_once(zoo, tmp_path: Path) -> None:
    recipe = recipe_of(zoo("llama"), write_records(tmp_path / "records.jsonl", 12), tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    text = on_a_terminal(["train", str(tmp_path / "recipe.yaml")], tmp_path)
    assert text.count(CTRL_C) == 1 and "tokens/s" in text and "GiB planned" in text
    assert "done: 6 steps" in text and "\x1b[?25h" in text  # the cursor is visible again
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def on_a_terminal(arguments: list[str], folder: Path) -> str:
    """The output of `qlora ARGUMENTS` in a forked child on a terminal of 100 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))

    def work(notify: Notify) -> int:
        for stream in (0, 1, 2):
            os.dup2(slave, stream)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True) for n in (1, 2)
        )
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100"}
        os.close(slave)
        return run_cli(arguments)

    child = Child(work, folder / "log")
    os.close(slave)
    output = b""
    while select.select([master], [], [], 120)[0]:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # how Linux reports that the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(master)
    assert child.wait() == 0, output.decode(errors="replace")[-2000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", output.decode(errors="replace"))
