"""The log of a run: metrics.jsonl, a live panel on a terminal, plain lines in a pipe, trackers if configured."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora.training.live_panel import Panel, answers_text, live_panels, prompt_answer_text
from qlora.utils.atomic_files import write_error, write_text
from qlora.utils.progress import ProgressReporter, clock
from qlora.utils.redact import redacted

METRICS = "metrics.jsonl"
REDRAW_SECONDS, REDRAW_SHARE = 30.0, 0.01  # least time between two drawings of the report; most of the run's time
CTRL_C = "Ctrl-C ends the run after the current step, with an exact checkpoint; the same command resumes it"
Track = Callable[[Mapping[str, float], int], None]


def console() -> Console:
    """A console on stderr; stdout is for the output of programs."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Log:
    """The log of one run; only rank 0's is not quiet. `name` prefixes its lines where several runs share a terminal."""

    def __init__(
        self, folder: Path, track: Track = lambda values, step: None, quiet: bool = False, name: str = ""
    ) -> None:
        self.path, self.track, self.quiet, self.name = folder / METRICS, track, quiet, name
        self.console = console()
        self.total_steps = 0
        self.planned_bytes: int | None = None  # of the memory plan, shown with the measured bytes
        self.redraw_report: Callable[[], None] = lambda: None  # called after evaluations, and every REDRAW_SECONDS
        self._redraw_at = 0.0
        self._panel: Panel | None = None
        self._started: tuple[int, float] | None = None  # first logged step and its time, for the time left

    def progress(self, task: str, unit: str = "sequences") -> ProgressReporter:
        """Progress of a long task inside the run: in the panel where there is one, else in occasional lines."""
        return ProgressReporter(self._panel.update_status if self._panel else self.print, task, unit)

    def truncate(self, step: int, evaluated: bool = True) -> None:
        """Keep the metrics up to `step` and delete later lines, which a resumed run writes again.

        evaluated: whether the checkpoint includes the evaluation of `step`; if not, that line is deleted too.
        """
        kept = [line for line in _lines(self.path) if step and _is_kept(line, step, evaluated)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def print(self, text: str) -> None:
        """Print one line, unless quiet."""
        if not self.quiet:
            self.print_always(f"{self.name}: {text}" if self.name else text)

    def print_always(self, text: str) -> None:
        """Print one line even if quiet: an error, or work that another rank than 0 does for all."""
        self.console.print(redacted(text), markup=False)

    def log_step(self, line: Mapping[str, Any]) -> None:
        """Log the metrics of training steps."""
        self._write({"event": "train", **line})
        if self._panel:
            self._panel.update_step(line)
        elif not self.quiet and self._is_due(int(line["step"])):
            self.print(self._step_line(line))
        if time.monotonic() >= self._redraw_at:
            self._redraw()

    def log_evaluation(self, line: Mapping[str, Any]) -> None:
        """Log an evaluation."""
        self._write({"event": "eval", **line})
        if self._panel:
            self._panel.update_evaluation(line)
        self._redraw()
        beside = f"perplexity {line['perplexity']:.3f}" if "perplexity" in line else answers_text(line, "eval_")
        self.print(f"step {line['step']:>6}  held-out loss {line['eval_loss']:.4f}  {beside}")
        for answer in line.get("answers", ()):
            self.print(f"{'':13}{prompt_answer_text(answer)}")

    def _redraw(self) -> None:
        started = time.monotonic()
        self.redraw_report()
        ended = time.monotonic()
        self._redraw_at = ended + max(REDRAW_SECONDS, (ended - started) / REDRAW_SHARE)

    def _step_line(self, line: Mapping[str, Any]) -> str:
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        step = int(line["step"])
        return (
            f"step {step:>6}/{self.total_steps}  loss {loss}  {answers_text(line)}rate {line['learning_rate']:.2e}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  {self._time_left(step)}"
        )

    def _is_due(self, step: int) -> bool:
        """About fifty lines a run are printed; metrics.jsonl has every step."""
        every = max(1, self.total_steps // 50)
        return step % every == 0 or step in (1, self.total_steps)

    def _time_left(self, step: int) -> str:
        if self._started is None:
            self._started = step, time.monotonic()
            return ""
        first_step, started = self._started
        seconds = (time.monotonic() - started) / max(1, step - first_step) * (self.total_steps - step)
        return f"{clock(seconds)} left"

    def _write(self, line: Mapping[str, Any]) -> None:
        finite = {key: None if _not_finite(value) else value for key, value in line.items()}
        text = json.dumps(finite) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise write_error(self.path, len(text), error) from error
        numbers = {key: value for key, value in finite.items() if isinstance(value, int | float) and key != "step"}
        self.track(numbers, int(line["step"]))


@contextmanager
def live_display(runs: Mapping[Log, int], stopping: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Inside the block runs are displayed: live panels on a terminal, plain lines elsewhere.

    runs: logs and their total steps. stopping: whether a stop signal was received, which the panels show.
    """
    console = next(iter(runs)).console  # shared: lines printed above a panel must go through the panel's console
    for log, total_steps in runs.items():
        log.total_steps, log.console = total_steps, console
    if all(log.quiet for log in runs) or not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    console.print(CTRL_C)
    for log, total_steps in runs.items():
        log._panel = Panel(console, total_steps, log.planned_bytes, stopping, log.name)
    try:
        with live_panels(console, [log._panel for log in runs if log._panel]):
            yield
    finally:
        for log in runs:
            log._panel = None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without damaged ones."""
    return _lines(folder / METRICS)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line for text in texts if (line := _parsed(text)) is not None]


def _is_kept(line: Mapping[str, Any], step: int, evaluated: bool) -> bool:
    line_step = line.get("step", 0)
    return bool(line_step < step or (line_step == step and (evaluated or line.get("event") != "eval")))


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
