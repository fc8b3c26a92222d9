"""Fields of a record that remember which of them were read, so that a report can name those that no format reads."""

from collections.abc import Iterator, Mapping
from typing import Any


class TrackedFields(Mapping[str, Any]):
    """A read-only view of a record's fields. `in` and iteration do not count as reading a field."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._fields[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a field, or `default`."""
        self._read.add(key)
        return self._fields.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def unread(self) -> tuple[str, ...]:
        """Keys with a value that was not read. An empty value (null, "", [], {}) holds nothing that could be lost."""
        if self._fields.keys() <= self._read:
            return ()
        return tuple(
            key
            for key, value in self._fields.items()
            if key not in self._read and value is not None and value not in ("", [], {})
        )
