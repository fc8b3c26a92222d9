"""Where a setting was written, and one message out of many problems."""

from collections.abc import Iterable
from typing import NamedTuple

from qlora.errors import RecipeError

MAX_PROBLEMS = 30  # lines in one message
LONGEST_KEY = 60  # letters of a key that are shown

Path = tuple[str | int, ...]  # ("data", "train", 0, "path")


class Place(NamedTuple):
    """Where a setting was written, as an error names it: `recipe.yaml:12: adapter.rank`."""

    source: str  # the file as given, or `command line`
    line: int  # counted from 1; 0 where lines make no sense
    key: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return f"{self.source}{line}: {self.key}" if self.key else f"{self.source}{line}"

    def below(self, path: Path) -> "Place":
        """The place of a value inside this one."""
        return self._replace(key=dotted(path, self.key))


Problem = tuple[Place, str]


def dotted(path: Path, start: str = "") -> str:
    """`data.train[0].path`, behind `start`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{_one_line(step)}" for step in path)
    return "".join((start, *steps)).removeprefix(".")


def _one_line(key: str) -> str:
    short = key if len(key) <= LONGEST_KEY else key[:LONGEST_KEY] + "..."
    return short if short.isprintable() else ascii(short)


def complain(problems: Iterable[Problem]) -> None:
    """Raise one RecipeError with a line for each problem, in the order of the file; the first of a place counts."""
    first: dict[Place, str] = {}
    for place, text in problems:
        first.setdefault(place, text)
    lines = [f"{place}: {text}" for place, text in sorted(first.items(), key=lambda item: item[0].line or float("inf"))]
    if not lines:
        return
    more = [f"... and {len(lines) - MAX_PROBLEMS} more problems."] if len(lines) > MAX_PROBLEMS else []
    raise RecipeError("\n".join(lines[:MAX_PROBLEMS] + more))
