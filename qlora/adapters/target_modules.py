"""Resolve a recipe's `adapter.targets` (names, ends of paths, or one regular expression) to module paths."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from qlora.errors import AdapterError


def select(paths: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The paths that `targets` matches: `all-linear`, a list of names (paths or their ends), or one pattern."""
    candidates = list(paths)
    if targets == "all-linear":
        return candidates
    if isinstance(targets, str):
        return _matching_paths(candidates, targets, _compile(targets).fullmatch)
    if not targets:
        raise AdapterError(
            "adapter.targets: an empty list adapts nothing. Allowed: all-linear, or names such as q_proj."
        )
    chosen = {path for name in targets for path in _matching_paths(candidates, name, _ends_with(name))}
    return [path for path in candidates if path in chosen]


def nearest_names(name: str, paths: Iterable[str]) -> tuple[str, str]:
    """For an error about `name`: ` Did you mean [q_proj]?` (empty if nothing is near), and the paths' last names."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    near = get_close_matches(name, leaves, n=1)
    return f" Did you mean [{near[0]}]?" if near else "", ", ".join(leaves)


def _matching_paths(candidates: list[str], name: str, matches: Any) -> list[str]:
    paths = [path for path in candidates if matches(path)]
    if paths:
        return paths
    hint, leaves = nearest_names(name, candidates)
    raise AdapterError(
        f"adapter.targets: {name!r} matches no linear layer of the decoder.{hint} "
        f"Layers: {leaves}. Allowed: all-linear, a list of names, or one regular expression for full paths "
        f"such as {candidates[0] if candidates else 'model.layers.0.mlp.up_proj'}."
    )


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise AdapterError(f"adapter.targets: {text!r} is not a regular expression: {error}.") from error


def _ends_with(name: str) -> Any:
    return lambda path: path == name or path.endswith(f".{name}")
