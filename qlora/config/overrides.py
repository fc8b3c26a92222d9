"""Overrides: `key=value`, `--key value` and `--key=value` -> paths and values, through the same YAML reader."""

from collections.abc import Iterable, Sequence
from typing import Any

from qlora.config.locations import Location, Path, Problem
from qlora.config.yaml_document import parse
from qlora.errors import RecipeError

SOURCE = "command line"

Override = tuple[Path, Any, dict[Path, Location]]  # ("adapter", "rank"), 32, the locations of all nested keys


def read_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides in order, and the problems of those that can't be read."""
    overrides: list[Override] = []
    problems: list[Problem] = []
    for key, text in split_overrides(arguments):
        path: Path = tuple(key.replace("-", "_").split("."))
        location = Location(SOURCE, 0, ".".join(map(str, path)))
        try:
            if text is None:
                raise RecipeError(f"{location}: no value. Write it as key=value, --key value or --key=value.")
            if not all(path):
                raise RecipeError(f"{location}: not a key. Write section.key=value.")
            document = parse(text, SOURCE, path)
        except RecipeError as error:
            problems.append((location, str(error).removeprefix(f"{location}: ")))
            continue
        problems += document.problems
        overrides.append((path, document.value, document.locations))
    return overrides, problems


def split_overrides(arguments: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    """`(key, text)` of each override; text None if there is no value."""
    pending: str | None = None  # a `--key` whose value is the next argument
    for argument in arguments:
        if pending is not None and not argument.startswith("--"):
            yield pending, argument
            pending = None
            continue
        if pending is not None:
            yield pending, None
        key, equals, text = argument.partition("=")
        pending = None
        if equals:
            yield key.removeprefix("--"), text
        elif argument.startswith("--"):
            pending = key[2:]
        else:
            yield argument, None
    if pending is not None:
        yield pending, None
