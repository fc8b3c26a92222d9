r"""What `rank_pattern` and `alpha_pattern` mean, as PEFT reads them: of the keys that fit a path the first one counts.

A key is a name, the end of a path, or a regular expression for one: it fits where `^(.*\.)?(KEY)$` does.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from qlora.adapters.target_modules import named_nearest
from qlora.errors import AdapterError

T = TypeVar("T")


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first key that fits `path`, else the default."""
    return next((value for key, value in patterns.items() if fits(key, path)), default)


def fits(key: str, path: str) -> bool:
    """Whether a pattern's key means the module at `path`."""
    return re.fullmatch(rf"(?:.*\.)?(?:{key})", path) is not None


def refuse_idle(setting: str, patterns: Mapping[str, object], paths: Sequence[str]) -> None:
    """AdapterError, with the nearest name, for a key of `setting` that decides for none of the adapted `paths`."""
    deciding = {path: next((key for key in patterns if fits(key, path)), None) for path in paths}
    for key in patterns.keys() - set(deciding.values()):
        earlier = next((other for path, other in deciding.items() if fits(key, path)), None)
        if earlier:
            raise AdapterError(
                f"{setting}: {key!r} has no effect: {earlier!r} stands before it and fits the same layers, and the "
                "first one counts. Change their order, or remove one."
            )
        hint, leaves = named_nearest(key, paths)
        raise AdapterError(
            f"{setting}: {key!r} fits no adapted layer.{hint} Adapted: {leaves}. Allowed: a name, the end "
            "of a path such as layers.0.mlp.up_proj, or a regular expression for it."
        )
