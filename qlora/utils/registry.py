"""The table of kinds: a kind's name in YAML -> its class, imported only when it is chosen."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from qlora.errors import RecipeError, did_you_mean


class Registry(Mapping[str, Any]):
    """`kind -> "module:Class"`. Looking a kind up imports its class; listing the kinds imports nothing."""

    def __init__(self, noun: str, **entries: str) -> None:
        self.noun = noun
        self._entries = entries

    def __getitem__(self, kind: str) -> Any:
        """The class of `kind`. RecipeError, with the nearest name, if the table has no such kind."""
        if kind not in self._entries:
            raise RecipeError(f"{self.noun}: no {kind!r}.{did_you_mean(kind, self._entries)}")
        module, _, name = self._entries[kind].partition(":")
        return getattr(import_module(module), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, kind: object) -> bool:
        return kind in self._entries
