"""What stops a run, or a step: signals, at once or at the step's end, and gradients that are not finite."""

import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qlora.distributed.processes import Processes
from qlora.errors import QloraError, Stopped

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SAME_SIGNAL_SECONDS = 1.0
NOTHING_TO_SAVE = "before the first step: nothing new to save; the same command starts it again"
PATIENCE = 3  # steps in a row without a finite gradient before the run ends


class Interrupted(BaseException):
    """Raised wherever the program is when a signal comes before there is anything to save; no library catches it."""

    def __init__(self, error: Stopped) -> None:
        super().__init__(str(error))
        self.error = error


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; another one, a second later or more, ends the process at once.

    Within a second it is the same one: a launcher passes on what the terminal sent as well, the kernel once a thread.
    While there is nothing to save (`at_once`) the first one ends the run where it is; later the loop looks at `number`.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = True
        self._when = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.number is None:
            self.number, self._when = number, time.monotonic()
            if self.at_once:
                raise Interrupted(self.error(NOTHING_TO_SAVE))
        elif time.monotonic() - self._when > SAME_SIGNAL_SECONDS:
            raise SystemExit(128 + number)

    @property
    def came(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def error(self, saved: str) -> Stopped:
        """The error to end the run with, once `saved` is on disk."""
        number = self.number or signal.SIGTERM
        return Stopped(f"stopped by {signal.Signals(number).name}; {saved}", number)


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Inside the block SIGINT and SIGTERM end the run at once, or, from the first step on, at the end of a step.

    Outside the main thread, where Python takes no signals, the process keeps its own way with them.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        _follow_the_launcher()
        yield stop
    except Interrupted as abandoned:
        raise abandoned.error from None
    except RuntimeError as error:
        if not stop.came or Processes.launched() < 2:
            raise
        # Another process took the same signal a moment earlier, and this one was waiting for it.
        raise stop.error(
            "another process of the run ended first; the same command goes on from what is saved"
        ) from error
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _follow_the_launcher() -> None:
    """Let the death of `accelerate launch` reach this process as SIGTERM: for one process it forwards no signal.

    Only under a launcher: a run whose shell was closed must go on.
    """
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if parent.exists() and any(
        name in parent.read_bytes() for name in (b"accelerate", b"torchrun", b"torch.distributed")
    ):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class NonFiniteGuard:
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
