"""Resource limits for a program of somebody else: a chat template, a regular expression of an adapter's file.

A sandbox keeps such a program from reaching anything. It does not keep it from looping endlessly or filling memory.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, TypeVar

from qlora.utils.machine import GIB

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")


class LimitExceeded(BaseException):
    """The processor time is used up. Not an Exception: the program itself can't catch it and go on."""


@dataclass(frozen=True)
class Limits:
    """Processor time and memory for one call. A system that has no such limit runs the call without it."""

    seconds: float  # of processor time, so that a busy machine changes nothing
    memory_bytes: int  # beyond what the process holds already
    timer: Literal["PROF", "VIRTUAL"] = "VIRTUAL"  # PROF counts user and system time, VIRTUAL user time alone

    @contextmanager
    def time(self) -> Iterator[None]:
        """LimitExceeded inside the block after `seconds`. Outside the main thread there is no limit."""
        if not _has_timer():
            yield
            return
        active = True

        def interrupt(number: int, frame: FrameType | None) -> None:
            if active:
                raise LimitExceeded

        timer = getattr(signal, f"ITIMER_{self.timer}")
        number = {"PROF": signal.SIGPROF, "VIRTUAL": signal.SIGVTALRM}[self.timer]
        handler_before, timer_before = signal.signal(number, interrupt), (0.0, 0.0)
        try:
            # Repeated, because Python drops an exception that is raised inside a destructor.
            timer_before = signal.setitimer(timer, self.seconds, self.seconds / 2)
            yield
        finally:
            active = False
            signal.setitimer(timer, *timer_before)
            signal.signal(number, handler_before)

    @contextmanager
    def memory(self) -> Iterator[None]:
        """MemoryError inside the block for what exceeds `memory_bytes`. The limit holds for all threads."""
        before = self._limit_address_space()
        try:
            yield
        finally:
            if before is not None:
                resource.setrlimit(resource.RLIMIT_AS, before)

    def call(self, function: Callable[[], T]) -> T:
        """The result of `function`. LimitExceeded or MemoryError beyond the limits; none outside the main thread."""
        if not _has_timer():
            return function()
        with self.memory(), self.time():
            return function()

    def apply_to_process(self) -> None:
        """Limit this process until it exits: the kernel kills it when its time is used up. For a forked child."""
        seconds = int(self.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        self._limit_address_space()

    def _limit_address_space(self) -> tuple[int, int] | None:
        """Lower the soft limit; returns the limits before, or None if the system has none that can be set."""
        with suppress(OSError, ValueError, AttributeError):
            before = resource.getrlimit(resource.RLIMIT_AS)
            held_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            finite = [limit for limit in (held_bytes + self.memory_bytes, *before) if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(finite), before[1]))
            return before
        return None


def _has_timer() -> bool:
    """Whether a signal can interrupt the calling thread."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


PATTERN_LIMITS = Limits(seconds=0.6, memory_bytes=2 * GIB, timer="PROF")  # an honest pattern takes milliseconds


def within_limits(function: Callable[[], T]) -> T:
    """The result of `function` under PATTERN_LIMITS. LimitExceeded or MemoryError if it exceeds them."""
    return PATTERN_LIMITS.call(function)
