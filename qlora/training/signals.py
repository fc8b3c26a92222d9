"""Stop signals: SIGINT and SIGTERM end a run at once while nothing is saved, later at the end of the current step."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qlora.distributed.processes import Processes
from qlora.errors import Stopped

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SAME_SIGNAL_SECONDS = 1.0
NOTHING_TO_SAVE = "before the first step: nothing new to save; the same command starts it again"


class Interrupted(BaseException):
    """Raised by the signal handler before there is anything to save. A BaseException, so that no library catches it."""

    def __init__(self, error: Stopped) -> None:
        super().__init__(str(error))
        self.error = error


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; a second one, at least a second later, exits the process immediately.

    Signals within a second count as one: the launcher forwards what the terminal sent too, the kernel once per thread.
    While `immediate`, the first signal raises Interrupted; later the training loop checks `received` after each step.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.immediate = True
        self._received_at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.number is None:
            self.number, self._received_at = number, time.monotonic()
            if self.immediate:
                raise Interrupted(self.error(NOTHING_TO_SAVE))
        elif time.monotonic() - self._received_at > SAME_SIGNAL_SECONDS:
            raise SystemExit(128 + number)

    @property
    def received(self) -> bool:
        """Whether a signal was received."""
        return self.number is not None

    def error(self, saved: str) -> Stopped:
        """The error that ends the run; `saved` says where it can continue from."""
        number = self.number or signal.SIGTERM
        return Stopped(f"stopped by {signal.Signals(number).name}; {saved}", number)


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Inside the block SIGINT and SIGTERM set the StopSignal; Interrupted leaves it as Stopped.

    Python handles signals in the main thread only; in another thread the process keeps its handlers.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, stop) for number in numbers]
    try:
        _terminate_with_launcher()
        yield stop
    except Interrupted as interrupted:
        raise interrupted.error from None
    except RuntimeError as error:
        if not stop.received or Processes.launched_world_size() < 2:
            raise
        # Another rank handled the same signal a moment earlier, while this one waited for it in a collective.
        raise stop.error("another rank ended first; the same command resumes from the newest checkpoint") from error
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _terminate_with_launcher() -> None:
    """Send this process SIGTERM when `accelerate launch` dies: for a single process it forwards no signal.

    Only under a launcher: without one, closing the shell must not end the run.
    """
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if parent.exists() and any(
        name in parent.read_bytes() for name in (b"accelerate", b"torchrun", b"torch.distributed")
    ):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
