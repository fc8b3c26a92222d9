"""The one table pattern: a kind's name in YAML -> its class, imported only when it is picked."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from qlora.errors import NotBuiltYet, RecipeError, did_you_mean


class Registry(Mapping[str, Any]):
    """A room's table of contents: `kind -> "module:Class"`. Looking a kind up imports its class, listing nothing."""

    def __init__(self, noun: str, **entries: str) -> None:
        self.noun = noun
        self._entries = entries

    def __getitem__(self, kind: str) -> Any:
        """The class of `kind`. RecipeError, with the nearest name, if the table has no such kind."""
        if kind not in self._entries:
            raise RecipeError(f"{self.noun}: no {kind!r}.{did_you_mean(kind, self._entries)}")
        module, _, name = self._entries[kind].partition(":")
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise NotBuiltYet(f"{self.noun}: {kind!r} is not built yet.{self._built()}") from error

    def _built(self) -> str:
        built = [kind for kind, place in self._entries.items() if find_spec(place.partition(":")[0])]
        return f" Built: {', '.join(built)}."

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, kind: object) -> bool:
        return kind in self._entries
