"""Overrides: `key=value`, `--key value` and `--key=value` -> paths and values, through the same YAML reader."""

from collections.abc import Iterable, Sequence
from typing import Any

from qlora.config.locations import Path, Place, Problem
from qlora.config.yaml_document import parse
from qlora.errors import RecipeError

SOURCE = "command line"

Override = tuple[Path, Any, dict[Path, Place]]  # ("adapter", "rank"), 32, the places of everything inside


def read_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides in the order given, and what can't be read among them."""
    found: list[Override] = []
    problems: list[Problem] = []
    for key, text in pairs(arguments):
        path: Path = tuple(key.replace("-", "_").split("."))
        place = Place(SOURCE, 0, ".".join(map(str, path)))
        try:
            if text is None:
                raise RecipeError(f"{place}: no value. Write it as key=value, --key value or --key=value.")
            if not all(path):
                raise RecipeError(f"{place}: not a key. Write section.key=value.")
            document = parse(text, SOURCE, path)
        except RecipeError as error:
            problems.append((place, str(error).removeprefix(f"{place}: ")))
            continue
        problems += document.problems
        found.append((path, document.value, document.places))
    return found, problems


def pairs(arguments: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    """`(key, text)` of each override; no text where there is no value."""
    waiting: str | None = None
    for argument in arguments:
        if waiting is not None and not argument.startswith("--"):
            yield waiting, argument
            waiting = None
            continue
        if waiting is not None:
            yield waiting, None
        key, equals, text = argument.partition("=")
        waiting = None
        if equals:
            yield key.removeprefix("--"), text
        elif argument.startswith("--"):
            waiting = key[2:]
        else:
            yield argument, None
    if waiting is not None:
        yield waiting, None
