"""The live panel of a run on a terminal: how far, how good, how fast, how much memory.  Door: rich."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora.utils.progress import clock

STOPPING = "stopping after this step with a checkpoint; Ctrl-C again: at once, without"
REFRESH_HERTZ = 2
SMOOTHED = 0.1  # weight of the newest loss in the smoothed one
GIB = 2**30


@contextmanager
def live(console: Console, panels: Sequence["Panel"]) -> Iterator[None]:
    """Inside the block the panels stand below everything that is printed; afterwards they are gone."""

    def shown() -> RenderableType:
        return panels[0].render() if len(panels) == 1 else Group(*(panel.line() for panel in panels))

    with Live(get_renderable=shown, console=console, refresh_per_second=REFRESH_HERTZ, transient=True):
        yield


class Panel:
    """What is shown; the log tells it each line of metrics."""

    def __init__(
        self,
        console: Console,
        steps: int,
        planned_bytes: int | None,
        stopping: Callable[[], bool],
        name: str = "",
    ) -> None:
        self.name = name  # where several runs are shown
        self._console, self._steps, self._planned_bytes, self._stopping = console, steps, planned_bytes, stopping
        self._train: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._best: Mapping[str, Any] = {}
        self._smooth: float | None = None
        self._work = ""
        self._started = time.monotonic()
        self._first_step: int | None = None

    def train(self, line: Mapping[str, Any]) -> None:
        """A logged training step."""
        if self._first_step is None:
            self._first_step, self._started = int(line["step"]), time.monotonic()
        self._train, self._work = line, ""
        loss = line.get("loss")
        if loss is not None:
            self._smooth = loss if self._smooth is None else SMOOTHED * loss + (1 - SMOOTHED) * self._smooth

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """An evaluation."""
        self._evaluation, self._work = line, ""
        if not self._best or line["eval_loss"] < self._best["eval_loss"]:
            self._best = line

    def working(self, text: str) -> None:
        """What goes on between two steps, in a few words; nothing once a step or an evaluation is there."""
        self._work = text

    def render(self) -> RenderableType:
        """The panel as it is now."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        step = int(self._train.get("step", 0))
        far = Table.grid(padding=(0, 1))
        share = f"{100 * step // self._steps} %"
        bar = ProgressBar(total=self._steps, completed=step, width=max(10, min(40, self._console.width - 56)))
        far.add_row(Text(f"{step:,} of {self._steps:,}"), bar, Text(share), Text(self._left(step)))
        table.add_row("step", far)
        for name, text in self._rows():
            table.add_row(name, _one_line(text))
        last = _one_line(STOPPING, "bold") if self._stopping() else _one_line(self._work, "dim")
        return Group(table, last)

    def line(self) -> RenderableType:
        """One of several runs in one line."""
        step, loss = int(self._train.get("step", 0)), self._train.get("loss")
        told = "" if loss is None else f"   loss {loss:.4f}   {self._left(step)}"
        best = f"   best {_scored(self._best)}" if self._best else ""
        return _one_line(f"{self.name or 'step'}  {step:,} of {self._steps:,}{told}{best}")

    def _rows(self) -> Iterator[tuple[str, str]]:
        line = self._train
        if line:
            loss = "none: no token was trained" if line["loss"] is None else f"{line['loss']:.4f}"
            smooth = "" if self._smooth is None else f"   smoothed {self._smooth:.4f}"
            yield "loss", f"{loss}{smooth}   rate {line['learning_rate']:.2e}   gradient {line['grad_norm']:.3g}"
            yield "speed", f"{line['tokens_per_second']:,.0f} tokens/s   {self._memory(line)}"
        if self._evaluation:
            yield "held out", f"{_scored(self._evaluation)}   best {_scored(self._best)}"

    def _memory(self, line: Mapping[str, Any]) -> str:
        planned = f" of {self._planned_bytes / GIB:.2f} GiB planned" if self._planned_bytes else ""
        return f"memory {line['peak_bytes'] / GIB:.2f} GiB at most{planned}"

    def _left(self, step: int) -> str:
        if self._first_step is None or step <= self._first_step:
            return ""
        seconds = time.monotonic() - self._started
        left = seconds / (step - self._first_step) * (self._steps - step)
        return f"{clock(left)} left"


def _one_line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _scored(line: Mapping[str, Any]) -> str:
    return f"{line['eval_loss']:.4f} at step {line['step']:,}"
