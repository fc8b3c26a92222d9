"""Adapters on the command line: NAME=PATH, and NAME=PATH:WEIGHT in a weighted sum."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from qlora.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
BASE = "base"  # the base model without an adapter
RUN_ADAPTER = "own"  # the adapter of the run itself
MAX_WEIGHT = 1e6  # of an adapter in a sum


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter of a sum: its name, its folder, and its weight."""

    name: str
    path: str
    weight: float


def parse_weighted_adapter(text: str) -> WeightedAdapter:
    """`NAME=PATH` or `NAME=PATH:WEIGHT`. InputError for anything else."""
    name, _, rest = text.partition("=")
    path, _, number = rest.rpartition(":")
    weight = _parse_number(number) if path else None
    if weight is None:
        path, weight = rest, 1.0
    if not abs(weight) <= MAX_WEIGHT:
        raise InputError(f"{text!r}: found weight {weight:g}, allowed: a number of at most {MAX_WEIGHT:g}.")
    return WeightedAdapter(_check_name(name, path, text), expanduser(path), weight)


def parse_weighted_adapters(texts: Sequence[str]) -> list[WeightedAdapter]:
    """The adapters of a sum: two or more, with different names."""
    adapters = [parse_weighted_adapter(text) for text in texts]
    _refuse_duplicates([adapter.name for adapter in adapters])
    if len(adapters) < 2:
        raise InputError(f"2 adapters or more are needed, found {len(adapters)}.")
    return adapters


def named_adapters(texts: Sequence[str], run_adapter: str | None = None) -> dict[str, str]:
    """Name -> folder of `NAME=PATH` arguments, after the run's own adapter; a PATH alone is named after its folder."""
    pairs = [text.split("=", 1) if "=" in text else [Path(text).resolve().name, text] for text in texts]
    named = [(_check_name(name, path, text), expanduser(path)) for (name, path), text in zip(pairs, texts, strict=True)]
    named = [*([(RUN_ADAPTER, run_adapter)] if run_adapter else []), *named]
    _refuse_duplicates([name for name, _ in named])
    return dict(named)


def _check_name(name: str, path: str, text: str) -> str:
    if not NAME.fullmatch(name) or not path:
        raise InputError(
            f"{text!r}: an adapter is written NAME=PATH, as in polite=runs/polite; a name has letters, digits, - and _."
        )
    if name == BASE:
        raise InputError(f"{text!r}: {BASE} is the base model. Give the adapter another name.")
    return name


def _refuse_duplicates(names: Sequence[str]) -> None:
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate:
        raise InputError(f"{duplicate}= is given twice. Give each adapter another name.")


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
