"""What a run did on the pretended GPU: host syncs, kernel launches, copies; and violations, errors or races there."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

PACKAGE, TESTS = str(ROOT / "qlora"), str(ROOT / "tests")
HERE = str(Path(__file__).parent)


class GpuError(RuntimeError):
    """Something that fails, or gives other numbers from run to run, on a real GPU."""


class Event(NamedTuple):
    """What happened, and the line of the package that caused it."""

    what: str
    line: str


@dataclass
class Counters:
    """Counts by event. `strict`: the first violation raises GpuError, with the line."""

    strict: bool = True
    syncs: Counter[Event] = field(default_factory=Counter)
    copies: Counter[Event] = field(default_factory=Counter)
    violations: Counter[Event] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def sync(self, what: str) -> None:
        """The host waits for the GPU."""
        self.syncs[Event(what, package_line())] += 1

    def copy(self, what: str) -> None:
        """A copy between host and GPU."""
        self.copies[Event(what, package_line())] += 1

    def violation(self, what: str, line: str | None = None) -> None:
        """Count an error; raise it unless a test wants to see what follows."""
        event = Event(what, line or package_line())
        self.violations[event] += 1
        if self.strict:
            raise GpuError(f"{event.what}, at {event.line}")

    @property
    def launch_count(self) -> int:
        """Kernels launched."""
        return sum(self.launches.values())

    def clear(self) -> None:
        """Start to count again."""
        for counter in (self.syncs, self.copies, self.violations, self.launches):
            counter.clear()

    def report(self) -> str:
        """All events, most frequent first."""
        lines = [f"{self.launch_count} kernel launches"]
        for title, counter in (("violation", self.violations), ("host sync", self.syncs), ("copy", self.copies)):
            lines += [f"{title}: {count:5} x {what}   {line}" for (what, line), count in counter.most_common()]
        return "\n".join(lines)


def package_line() -> str:
    """`memory/copy_stream.py:38`: the innermost line of the package on the stack, else that of a test."""
    frame, test_line = sys._getframe(1), "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        if test_line == "?" and file.startswith(TESTS) and not file.startswith(HERE):
            test_line = f"{file[len(TESTS) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return test_line
