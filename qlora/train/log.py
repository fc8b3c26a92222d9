"""What a run says while it runs: metrics.jsonl, a live bar on a terminal, plain lines in a pipe, trackers if asked."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from qlora.files import refused, write_text
from qlora.redact import redacted

METRICS = "metrics.jsonl"
Track = Callable[[Mapping[str, float], int], None]


def console() -> Console:
    """People read stderr; stdout belongs to programs."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class RowsTold:
    """Told how many rows were read so far, says so in a line every few seconds, ever more rarely; nothing at first."""

    def __init__(self, say: Callable[[str], None], first_seconds: float = 5.0) -> None:
        self._say, self._started = say, time.monotonic()
        self._first_seconds = self._due_seconds = first_seconds

    def __call__(self, rows: int) -> None:
        """`rows` have been read."""
        seconds = time.monotonic() - self._started
        if seconds >= self._due_seconds:
            self._due_seconds = seconds + max(self._first_seconds, seconds / 10)
            self._say(f"data: {rows:,} rows read, {rows / seconds:,.0f} rows/s")


class Log:
    """One run's voice; `name` stands before its lines where several speak. Only the main process has one that does."""

    def __init__(
        self, folder: Path, track: Track = lambda values, step: None, quiet: bool = False, name: str = ""
    ) -> None:
        self.path, self.track, self.quiet, self.name = folder / METRICS, track, quiet, name
        self.console = console()
        self.steps = 0
        self._bar: tuple[Progress, TaskID] | None = None
        self._started: tuple[int, float] | None = None  # first logged step and when, for the time left

    def restart(self, step: int, evaluated: bool = True) -> None:
        """Keep the metrics up to `step` and drop later lines, which a resumed run writes again.

        evaluated: whether the evaluation of `step` is part of the checkpoint; if not, its line is written again too.
        """
        kept = [line for line in _lines(self.path) if step and _is_kept(line, step, evaluated)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def say(self, text: str) -> None:
        """One line for people."""
        if not self.quiet:
            self.say_anyway(f"{self.name}: {text}" if self.name else text)

    def say_anyway(self, text: str) -> None:
        """One line from a process that is not the main one, about work that it does for all of them."""
        self.console.print(redacted(text), markup=False)

    def train(self, line: Mapping[str, Any]) -> None:
        """A logged training step."""
        self._write({"event": "train", **line})
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  rate {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
        self._show(int(line["step"]), text)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """An evaluation."""
        self._write({"event": "eval", **line})
        self.say(f"step {line['step']:>6}  held-out loss {line['eval_loss']:.4f}  perplexity {line['perplexity']:.3f}")

    def _show(self, step: int, text: str) -> None:
        if self._bar:
            self._bar[0].update(self._bar[1], completed=step, description=text)
        elif not self.quiet and self._is_due(step):
            self.say(f"step {step:>6}/{self.steps}  {text}  {self._time_left(step)}")

    def _is_due(self, step: int) -> bool:
        """In a pipe about fifty lines a run are enough; every step is in metrics.jsonl."""
        every = max(1, self.steps // 50)
        return step % every == 0 or step in (1, self.steps)

    def _time_left(self, step: int) -> str:
        if self._started is None:
            self._started = step, time.monotonic()
            return ""
        first, when = self._started
        seconds = (time.monotonic() - when) / max(1, step - first) * (self.steps - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _write(self, line: Mapping[str, Any]) -> None:
        finite = {key: None if _not_finite(value) else value for key, value in line.items()}
        written = json.dumps(finite) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(written)
        except OSError as error:
            raise refused(self.path, len(written), error) from error
        numbers = {key: value for key, value in finite.items() if isinstance(value, int | float) and key != "step"}
        self.track(numbers, int(line["step"]))


@contextmanager
def watching(runs: Mapping[Log, int]) -> Iterator[None]:
    """Inside the block runs of so many steps are shown: a live bar each on a terminal, plain lines elsewhere."""
    shared = next(iter(runs)).console  # what is printed beside a bar has to go through the bar's own console
    for log, steps in runs.items():
        log.steps, log.console = steps, shared
    if all(log.quiet for log in runs) or not shared.is_terminal:
        yield
        return
    columns = MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(TextColumn("[bold]{task.fields[name]}"), *columns, console=shared, transient=True) as progress:
        for log, steps in runs.items():
            log._bar = progress, progress.add_task("", total=steps, name=log.name or "step")
        yield
    for log in runs:
        log._bar = None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, damaged ones left out."""
    return _lines(folder / METRICS)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [found for text in texts if (found := _parsed(text)) is not None]


def _is_kept(line: Mapping[str, Any], step: int, evaluated: bool) -> bool:
    at = line.get("step", 0)
    return bool(at < step or (at == step and (evaluated or line.get("event") != "eval")))


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
