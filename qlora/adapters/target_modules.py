"""Resolve a recipe's `adapter.targets` (names, ends of paths, or one regular expression) to module paths."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from qlora.errors import AdapterError


def select(
    paths: Iterable[str], targets: str | Sequence[str], left_out: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """The paths that `targets` matches: `all-linear`, a list of names (paths or their ends), or one pattern.

    `left_out`: path -> reason, of linear layers that can't be adapted. AdapterError if there is no layer to adapt, or
    if one of several names or the pattern matches none.
    """
    candidates = list(paths)
    if not candidates:
        reasons = f" ({next(iter(left_out.values()))})" if left_out else ""
        raise AdapterError(f"adapter.targets: this model has no linear layer to adapt{reasons}. Choose another base.")
    if targets == "all-linear":
        return candidates
    _refuse_left_out(candidates, targets, left_out)
    if isinstance(targets, str):
        return _matching_paths(candidates, targets, _compile(targets).fullmatch)
    if not targets:
        raise AdapterError(
            "adapter.targets: an empty list adapts nothing. Allowed: all-linear, or names such as q_proj."
        )
    chosen = {path for name in targets for path in _matching_paths(candidates, name, _ends_with(name))}
    return [path for path in candidates if path in chosen]


def _refuse_left_out(candidates: list[str], targets: str | Sequence[str], left_out: Mapping[str, str]) -> None:
    """AdapterError for a name or a pattern that matches only layers that can't be adapted."""
    matchers = (
        {targets: _compile(targets).fullmatch} if isinstance(targets, str) else {t: _ends_with(t) for t in targets}
    )
    for name, matches in matchers.items():
        path = next((path for path in left_out if matches(path)), None)
        if path is not None and not any(matches(other) for other in candidates):
            raise AdapterError(
                f"adapter.targets: {name!r} can't be adapted: {left_out[path]}. Leave it out; all-linear does so."
            )


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
