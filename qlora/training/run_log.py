"""What a run says while it runs: metrics.jsonl, a live panel on a terminal, lines in a pipe, trackers if asked."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora.training.live_panel import Panel, live
from qlora.utils.atomic_files import refused, write_text
from qlora.utils.progress import ProgressReporter, clock
from qlora.utils.redact import redacted

METRICS = "metrics.jsonl"
REDRAW_SECONDS, REDRAW_SHARE = 30.0, 0.01  # between two drawings of the page, and of the run's time at most
CTRL_C = "Ctrl-C ends the run after the step at hand, with an exact checkpoint; the same command goes on from there"
Track = Callable[[Mapping[str, float], int], None]


def console() -> Console:
    """People read stderr; stdout belongs to programs."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Log:
    """One run's voice; `name` stands before its lines where several speak. Only the main process has one that does."""

    def __init__(
        self, folder: Path, track: Track = lambda values, step: None, quiet: bool = False, name: str = ""
    ) -> None:
        self.path, self.track, self.quiet, self.name = folder / METRICS, track, quiet, name
        self.console = console()
        self.steps = 0
        self.planned_bytes: int | None = None  # of the memory plan, beside what is measured
        self.redraw: Callable[[], None] = lambda: None  # the page about the run: after evaluations, and now and then
        self._redraw_at = 0.0
        self._panel: Panel | None = None
        self._started: tuple[int, float] | None = None  # first logged step and when, for the time left

    def rates(self, what: str, unit: str = "rows") -> ProgressReporter:
        """For a long work inside the run: in the panel where there is one, else a line now and then."""
        return ProgressReporter(self._panel.working if self._panel else self.say, what, unit)

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
        if self._panel:
            self._panel.train(line)
        elif not self.quiet and self._is_due(int(line["step"])):
            self.say(self._in_a_line(line))
        if time.monotonic() >= self._redraw_at:
            self._redraw()

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """An evaluation."""
        self._write({"event": "eval", **line})
        if self._panel:
            self._panel.evaluation(line)
        self._redraw()
        self.say(f"step {line['step']:>6}  held-out loss {line['eval_loss']:.4f}  perplexity {line['perplexity']:.3f}")

    def _redraw(self) -> None:
        began = time.monotonic()
        self.redraw()
        ended = time.monotonic()
        self._redraw_at = ended + max(REDRAW_SECONDS, (ended - began) / REDRAW_SHARE)  # long runs have long pages

    def _in_a_line(self, line: Mapping[str, Any]) -> str:
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        step = int(line["step"])
        return (
            f"step {step:>6}/{self.steps}  loss {loss}  rate {line['learning_rate']:.2e}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  {self._time_left(step)}"
        )

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
        return f"{clock(seconds)} left"

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
def watching(runs: Mapping[Log, int], stopping: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Inside the block runs of so many steps are shown: live panels on a terminal, plain lines elsewhere.

    stopping: whether a signal has come; the panel then says what happens next.
    """
    shared = next(iter(runs)).console  # what is printed beside a panel has to go through the panel's own console
    for log, steps in runs.items():
        log.steps, log.console = steps, shared
    if all(log.quiet for log in runs) or not shared.is_terminal or shared.is_dumb_terminal:
        yield
        return
    shared.print(CTRL_C)
    for log, steps in runs.items():
        log._panel = Panel(shared, steps, log.planned_bytes, stopping, log.name)
    try:
        with live(shared, [log._panel for log in runs if log._panel]):
            yield
    finally:
        for log in runs:
            log._panel = None


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
