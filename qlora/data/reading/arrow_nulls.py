"""Nulls that Arrow adds: in a table every object of a column has the keys of all of them, null where it had none."""

from collections.abc import Mapping
from typing import Any

_REAL_NULLS = ("default", "const")  # keys of a JSON schema whose value may be null
_NAMES = ("properties", "arguments")  # objects whose keys are names of parameters


def without_filled_nulls(fields: Mapping[str, Any], features: Any) -> dict[str, Any]:
    """A record of a table without the keys that are null inside its objects, as its JSON lines had them.

    features: the types of the columns (of `datasets`); None if they are not known. Columns, members of lists, and
    values that the table stores as JSON stay unchanged. So does the null of a schema's `default`, unless the key has
    other values in the table: then the null is much more often a filled one.
    """
    types = features if isinstance(features, Mapping) else {}
    return {name: _pruned(value, types.get(name), name) for name, value in fields.items()}


def _pruned(value: Any, feature: Any, name: str) -> Any:
    """`value`, which is stored under the key `name`, without the nulls inside it."""
    if _is_json(feature):
        return value
    if isinstance(value, Mapping):
        types = feature if isinstance(feature, Mapping) else {}
        real = () if name in _NAMES else [key for key in _REAL_NULLS if _is_always_null(types.get(key))]
        kept = {key: item for key, item in value.items() if item is not None or key in real}
        return {key: _pruned(item, types.get(key), key) for key, item in kept.items()}
    if isinstance(value, list):
        member = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        return [_pruned(item, member, name) for item in value]
    return value


def _is_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json"


def _is_always_null(feature: Any) -> bool:
    """Whether a column has no other value than null, as far as its type is known."""
    return getattr(feature, "dtype", "null") == "null"
