"""What stops a run, or a step: signals that wait for the step's end, and gradients that are not finite."""

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from qlora.errors import QloraError, Stopped

PATIENCE = 3  # steps in a row without a finite gradient before the run ends


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.number is not None:
            raise SystemExit(128 + number)
        self.number = number

    def error(self, saved: str) -> Stopped:
        """The error to end the run with, once `saved` is on disk."""
        number = self.number or signal.SIGTERM
        return Stopped(f"stopped by {signal.Signals(number).name}; {saved}", number)


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Inside the block SIGINT and SIGTERM only set a flag, which the loop looks at after every step."""
    stop = StopSignal()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class FiniteGuard:
    """Says whether a step may be taken; ends the run after PATIENCE steps in a row that may not."""

    def __init__(self) -> None:
        self.skipped_in_a_row = 0

    def allows(self, grad_norm: float, loss: float, step: int, where: Sequence[str]) -> bool:
        """False if the gradient's norm or the loss is not finite. QloraError, naming rows, when it keeps happening."""
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= PATIENCE:
            raise QloraError(
                f"step {step}: the loss or a gradient is not finite for {PATIENCE} steps in a row "
                f"(rows {', '.join(where[:3])}). Nothing of these steps was kept. "
                "Lower optim.learning_rate, or look at these rows with `qlora preview`."
            )
        return False
