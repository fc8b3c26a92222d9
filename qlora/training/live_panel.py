"""The live panel of a run on a terminal: progress, losses, speed and memory, drawn with rich."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora.utils.machine import GIB
from qlora.utils.progress import FIRST_SECONDS, ProgressReporter, clock

STOPPING = "stopping after this step with a checkpoint; Ctrl-C again: at once, without"
REFRESH_HERTZ = 2
SMOOTHING = 0.1  # weight of the newest loss in the smoothed loss

SHOWN_ANSWERS, SHOWN_PROMPT, SHOWN_ANSWER = 3, 30, 90  # answers to sample prompts in a panel; characters in a line


@contextmanager
def live_panels(console: Console, panels: Sequence["Panel"]) -> Iterator[None]:
    """Inside the block the panels are drawn below everything that is printed; afterwards they are removed."""

    def render() -> RenderableType:
        return panels[0].render() if len(panels) == 1 else Group(*(panel.render_line() for panel in panels))

    with Live(get_renderable=render, console=console, refresh_per_second=REFRESH_HERTZ, transient=True):
        yield


Report = Callable[[int, int | None], None]  # done, total (None: not known)


@contextmanager
def progress_bar(console: Console, task: str, print_line: Callable[[str], None]) -> Iterator["ProgressReporter | _Bar"]:
    """Reports `done, total` of a long task: a bar on a terminal, which is removed at the end; elsewhere lines."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield ProgressReporter(print_line, task)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield _Bar(progress, task)


class _Bar:
    """A bar that is drawn after FIRST_SECONDS: short tasks show none."""

    def __init__(self, progress: Progress, task: str) -> None:
        self._progress, self._task = progress, progress.add_task(task, total=None, visible=False)
        self._started = time.monotonic()

    def __call__(self, done: int, total: int | None = None) -> None:
        """`done` of `total` is done; total None: not known."""
        visible = time.monotonic() - self._started >= FIRST_SECONDS
        self._progress.update(self._task, completed=done, total=total, visible=visible)


class Panel:
    """The state that is displayed; the log updates it with each line of metrics."""

    def __init__(
        self,
        console: Console,
        total_steps: int,
        planned_bytes: int | None,
        stopping: Callable[[], bool],
        name: str = "",
    ) -> None:
        self.name = name  # shown where there are several runs
        self._console, self._total_steps = console, total_steps
        self._planned_bytes, self._stopping = planned_bytes, stopping
        self._train: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._best: Mapping[str, Any] = {}
        self._smoothed_loss: float | None = None
        self._status = ""
        self._started = time.monotonic()
        self._first_step: int | None = None

    def update_step(self, line: Mapping[str, Any]) -> None:
        """Show the metrics of training steps."""
        if self._first_step is None:
            self._first_step, self._started = int(line["step"]), time.monotonic()
        self._train, self._status = line, ""
        loss = line.get("loss")
        if loss is not None:
            smoothed = self._smoothed_loss
            self._smoothed_loss = loss if smoothed is None else SMOOTHING * loss + (1 - SMOOTHING) * smoothed

    def update_evaluation(self, line: Mapping[str, Any]) -> None:
        """Show an evaluation."""
        self._evaluation, self._status = line, ""
        if not self._best or line["eval_loss"] < self._best["eval_loss"]:
            self._best = line

    def update_status(self, text: str) -> None:
        """Show what runs between two steps, until the next step or evaluation."""
        self._status = text

    def render(self) -> RenderableType:
        """The panel of a single run."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        step = int(self._train.get("step", 0))
        progress = Table.grid(padding=(0, 1))
        percentage = f"{100 * step // self._total_steps} %"
        bar = ProgressBar(total=self._total_steps, completed=step, width=max(10, min(40, self._console.width - 56)))
        progress.add_row(Text(f"{step:,} of {self._total_steps:,}"), bar, Text(percentage), Text(self._time_left(step)))
        table.add_row("step", progress)
        for name, text in self._rows():
            table.add_row(name, _one_line(text))
        last = _one_line(STOPPING, "bold") if self._stopping() else _one_line(self._status, "dim")
        return Group(table, last)

    def render_line(self) -> RenderableType:
        """One line, for one of several runs."""
        step, loss = int(self._train.get("step", 0)), self._train.get("loss")
        latest = "" if loss is None else f"   loss {loss:.4f}   {self._time_left(step)}"
        best = f"   best {_loss_at_step(self._best)}" if self._best else ""
        return _one_line(f"{self.name or 'step'}  {step:,} of {self._total_steps:,}{latest}{best}")

    def _rows(self) -> Iterator[tuple[str, str]]:
        line = self._train
        if line:
            loss = "none: no token was trained" if line["loss"] is None else f"{line['loss']:.4f}"
            smoothed = "" if self._smoothed_loss is None else f"   smoothed {self._smoothed_loss:.4f}"
            yield "loss", f"{loss}{smoothed}   rate {line['learning_rate']:.2e}   gradient {line['grad_norm']:.3g}"
            if "margin" in line:
                yield "answers", answers_text(line)
            yield "speed", f"{line['tokens_per_second']:,.0f} tokens/s   {self._memory(line)}"
        if self._evaluation:
            answers = answers_text(self._evaluation, "eval_")
            yield "held out", f"{_loss_at_step(self._evaluation)}   {answers}best {_loss_at_step(self._best)}"
        for answer in self._evaluation.get("answers", ())[:SHOWN_ANSWERS]:
            yield "answers", prompt_answer_text(answer)

    def _memory(self, line: Mapping[str, Any]) -> str:
        planned = f" of {self._planned_bytes / GIB:.2f} GiB planned" if self._planned_bytes else ""
        return f"memory {line['peak_bytes'] / GIB:.2f} GiB at most{planned}"

    def _time_left(self, step: int) -> str:
        if self._first_step is None or step <= self._first_step:
            return ""
        seconds = time.monotonic() - self._started
        remaining = seconds / (step - self._first_step) * (self._total_steps - step)
        return f"{clock(remaining)} left"


def answers_text(line: Mapping[str, Any], prefix: str = "") -> str:
    """The accuracy and the margin of a line, if it has them; then two spaces."""
    shown = (("accuracy", "accuracy {:.1%}"), ("margin", "margin {:.3f}"), ("kl", "kl {:.3f}"))
    values = ((text, line.get(prefix + name)) for name, text in shown)
    return "".join(f"{text.format(value)}  " for text, value in values if value is not None)


def prompt_answer_text(answer: Mapping[str, str]) -> str:
    """The answer to a sample prompt in a line, with the base's where it is known."""
    base = f"   (base: {_shortened(answer['base'], SHOWN_ANSWER)})" if "base" in answer else ""
    return f"{_shortened(answer['prompt'], SHOWN_PROMPT)} \u2192 {_shortened(answer['answer'], SHOWN_ANSWER)}{base}"


def _shortened(text: str, limit: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}\u2026"


def _one_line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _loss_at_step(line: Mapping[str, Any]) -> str:
    return f"{line['eval_loss']:.4f} at step {line['step']:,}"
