"""Ceilings on what somebody else's program may cost: a chat template, a pattern out of an adapter's file.

A sandbox keeps such a program from reaching anything; it does not keep it from running for ever or filling memory.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

SECONDS = 0.6  # of processor time for one call; honest programs of this kind take milliseconds
MEMORY_BYTES = 2 * 2**30  # beyond what the process holds already
T = TypeVar("T")


class LimitExceeded(BaseException):
    """A call took too long; not an Exception, so that the program itself can't catch it and go on."""


class Limits:
    """Ceilings on each call of one program. They are armed once for many calls: then a call costs nothing extra."""

    def __init__(self) -> None:
        self._calls = self._seen = 0
        self._inside = False

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns; inside `armed` TooMuch after SECONDS at most, MemoryError beyond the memory."""
        self._calls += 1
        self._inside = True
        try:
            return work()
        finally:
            self._inside = False

    @contextmanager
    def armed(self, memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
        """Inside the block calls have ceilings, in the main thread of a system that knows them."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return
        handler = signal.signal(signal.SIGPROF, self._tick)
        before = signal.setitimer(signal.ITIMER_PROF, SECONDS / 2, SECONDS / 2)
        try:
            with _memory(memory_bytes):
                yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, *before)
            signal.signal(signal.SIGPROF, handler)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        """Twice within SECONDS: a call that was there the last time, and still is, has taken too long."""
        if self._inside and self._seen == self._calls:
            raise LimitExceeded
        self._seen = self._calls


def within_limits(work: Callable[[], T]) -> T:
    """What `work` returns, called once under ceilings. TooMuch or MemoryError if it reaches them."""
    ceilings = Limits()
    with ceilings.armed():
        return ceilings.call(work)


@contextmanager
def _memory(extra_bytes: int) -> Iterator[None]:
    try:
        import resource

        before, hard = resource.getrlimit(resource.RLIMIT_AS)
        ceiling = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + extra_bytes
        lowest = ceiling if before == resource.RLIM_INFINITY else min(before, ceiling)
        resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    except (ImportError, OSError, ValueError):  # not Linux
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (before, hard))
