"""Which paths a recipe's `adapter.targets` means: names, ends of names, or one pattern."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from qlora.errors import AdapterError


def select(paths: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The paths that `targets` means: `all-linear`, a list of names (paths or their ends), or one pattern."""
    known = list(paths)
    if targets == "all-linear":
        return known
    if isinstance(targets, str):
        return _matching(known, targets, _pattern(targets).fullmatch)
    if not targets:
        raise AdapterError(
            "adapter.targets: an empty list adapts nothing. Allowed: all-linear, or names such as q_proj."
        )
    chosen = {path for name in targets for path in _matching(known, name, _ends_with(name))}
    return [path for path in known if path in chosen]


def named_nearest(name: str, paths: Iterable[str]) -> tuple[str, str]:
    """For an error about `name`: ` Did you mean [q_proj]?` (empty if nothing is near), and the paths' last names."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    near = get_close_matches(name, leaves, n=1)
    return f" Did you mean [{near[0]}]?" if near else "", ", ".join(leaves)


def _matching(known: list[str], name: str, matches: Any) -> list[str]:
    found = [path for path in known if matches(path)]
    if found:
        return found
    hint, leaves = named_nearest(name, known)
    raise AdapterError(
        f"adapter.targets: {name!r} matches no linear layer of the decoder.{hint} "
        f"Layers: {leaves}. Allowed: all-linear, a list of names, or one regular expression for whole paths "
        f"such as {known[0] if known else 'model.layers.0.mlp.up_proj'}."
    )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise AdapterError(f"adapter.targets: {text!r} is no regular expression: {error}.") from error


def _ends_with(name: str) -> Any:
    return lambda path: path == name or path.endswith(f".{name}")
