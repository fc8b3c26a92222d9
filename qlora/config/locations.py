"""Locations of settings in files and arguments, and one error out of many problems."""

from collections.abc import Iterable
from typing import NamedTuple

from qlora.errors import RecipeError

MAX_PROBLEMS = 30  # lines in one message
MAX_KEY_CHARS = 60  # of a key that are shown

Path = tuple[str | int, ...]  # ("data", "train", 0, "path")


class Location(NamedTuple):
    """Where a setting was written, as an error shows it: `recipe.yaml:12: adapter.rank`."""

    source: str  # the file's name, or `command line`
    line: int  # counted from 1; 0 where there are no lines
    key: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return f"{self.source}{line}: {self.key}" if self.key else f"{self.source}{line}"

    def child(self, path: Path) -> "Location":
        """The location of a value inside this one."""
        return self._replace(key=dotted(path, self.key))


Problem = tuple[Location, str]


def dotted(path: Path, prefix: str = "") -> str:
    """`data.train[0].path`, appended to `prefix`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{_one_line(step)}" for step in path)
    return "".join((prefix, *steps)).removeprefix(".")


def _one_line(key: str) -> str:
    short = key if len(key) <= MAX_KEY_CHARS else key[:MAX_KEY_CHARS] + "..."
    return short if short.isprintable() else ascii(short)


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise one RecipeError with a line for each problem, in the order of the file; one problem for each location."""
    first: dict[Location, str] = {}
    for location, text in problems:
        first.setdefault(location, text)
    in_order = sorted(first.items(), key=lambda item: item[0].line or float("inf"))
    lines = [f"{location}: {text}" for location, text in in_order]
    if not lines:
        return
    more = [f"... and {len(lines) - MAX_PROBLEMS} more problems."] if len(lines) > MAX_PROBLEMS else []
    raise RecipeError("\n".join(lines[:MAX_PROBLEMS] + more))
