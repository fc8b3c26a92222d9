"""Ceilings on what a row may cost while it is rendered: processor time and memory.

A chat template is a program, and a row is its input: what renders the probe in a moment may loop on one row. Where the
system has no such limits, or outside the main thread, there are none.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from qlora.data.types import RecordError

ROW_SECONDS = 1.0  # of the processor, so that a busy machine changes nothing; an honest row takes a few hundredths
ROW_BYTES = 2 * 2**30  # beyond what the process holds already


class _Rings(BaseException):
    """The time is over. No Exception, so that nothing between here and the template takes it for one of its own."""


@contextmanager
def time_limit(seconds: float = ROW_SECONDS) -> Iterator[None]:
    """RowError if what happens inside takes longer."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _ring)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.5)  # again, should the first one end in a destructor
        yield
    except _Rings:
        raise RecordError("takes too long to render", f"more than {seconds:g} s of the processor") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory(more_bytes: int = ROW_BYTES) -> Iterator[None]:
    """Inside, at most so much more address space: what asks for more gets a MemoryError."""
    before = _limit(more_bytes)
    try:
        yield
    finally:
        if before is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)


def _limit(more_bytes: int) -> tuple[int, int] | None:
    """Set the ceiling; the one before, or None where it can't be set."""
    with suppress(OSError, ValueError, AttributeError):
        before = resource.getrlimit(resource.RLIMIT_AS)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        least = [limit for limit in (held + more_bytes, *before) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(least), before[1]))
        return before
    return None


def _ring(number: int, frame: Any) -> None:
    raise _Rings
