r"""How `rank_pattern` and `alpha_pattern` are matched: as in PEFT, the first key that matches a path wins.

A key is a name, the end of a path, or a regular expression for one: it matches where `^(.*\.)?(KEY)$` does.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from qlora.adapters.target_modules import nearest_names
from qlora.errors import AdapterError
from qlora.utils.name_patterns import matches

T = TypeVar("T")


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first key that matches `path`, else the default."""
    return next((value for key, value in patterns.items() if matches(key, path)), default)


def refuse_unused(setting: str, patterns: Mapping[str, object], paths: Sequence[str]) -> None:
    """AdapterError, with the nearest name, for a key of `setting` that applies to none of the adapted `paths`."""
    first_match = {path: next((key for key in patterns if matches(key, path)), None) for path in paths}
    for key in patterns.keys() - set(first_match.values()):
        earlier = next((other for path, other in first_match.items() if matches(key, path)), None)
        if earlier:
            raise AdapterError(
                f"{setting}: {key!r} has no effect: {earlier!r} comes before it and matches the same layers, and the "
                "first match counts. Change their order, or remove one."
            )
        hint, leaves = nearest_names(key, paths)
        raise AdapterError(
            f"{setting}: {key!r} matches no adapted layer.{hint} Adapted: {leaves}. Allowed: a name, the end "
            "of a path such as layers.0.mlp.up_proj, or a regular expression for it."
        )
