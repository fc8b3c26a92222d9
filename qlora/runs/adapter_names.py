"""Adapters as users name them: NAME=PATH, and NAME=PATH:WEIGHT in a sum."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
BASE = "base"  # what the base alone is called where adapters are switched
OWN = "own"  # what a run's own adapter is called beside others
LARGEST = 1e6  # weight of an adapter in a sum


@dataclass(frozen=True)
class Part:
    """One adapter of a sum: its name, its folder, and its weight."""

    name: str
    path: str
    weight: float


def parse_part(text: str) -> Part:
    """`NAME=PATH` or `NAME=PATH:WEIGHT`. InputError for anything else."""
    name, _, rest = text.partition("=")
    path, _, weight = rest.rpartition(":")
    number = _number(weight) if path else None
    if number is None:
        path, number = rest, 1.0
    if not abs(number) <= LARGEST:
        raise InputError(f"{text!r}: a weight is a number, at most {LARGEST:g}.")
    return Part(_checked(name, path, text), path, number)


def parse_parts(texts: Sequence[str]) -> list[Part]:
    """The adapters of a sum, two or more, each under a name of its own."""
    parts = [parse_part(text) for text in texts]
    _refuse_twice([part.name for part in parts])
    if len(parts) < 2:
        raise InputError(f"2 adapters or more are needed, found {len(parts)}.")
    return parts


def named_adapters(texts: Sequence[str], own: str | None = None) -> dict[str, str]:
    """Name -> folder of `NAME=PATH` words, the run's `own` adapter first; a PATH alone is named after its folder."""
    pairs = [text.split("=", 1) if "=" in text else [Path(text).resolve().name, text] for text in texts]
    named = [(_checked(name, path, text), path) for (name, path), text in zip(pairs, texts, strict=True)]
    named = [*([(OWN, own)] if own else []), *named]
    _refuse_twice([name for name, _ in named])
    return dict(named)


def _checked(name: str, path: str, text: str) -> str:
    if not NAME.fullmatch(name) or not path:
        raise InputError(
            f"{text!r}: an adapter is written NAME=PATH, as in polite=runs/polite; a name has letters, digits, - and _."
        )
    if name == BASE:
        raise InputError(f"{text!r}: {BASE} is the base itself. Give the adapter another name.")
    return name


def _refuse_twice(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"{twice}= is there twice. Give each adapter a name of its own.")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
