"""Adapters that train on one base in turn: each keeps its layers, and one of them stands in the model at a time.

Whose turn it is is which modules stand in the layers' places: nothing is copied, the frozen matrices are shared, and an
adapter in place is named as if it were alone.
"""

from collections.abc import Mapping

from torch import nn

from qlora.adapters.inject import adapted, replace
from qlora.adapters.lora import LoraLinear


class RoundRobin:
    """The adapters of one base by name; None is the base alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: dict[str, Mapping[str, LoraLinear]] = {}
        self._here: str | None = None

    def keep(self, name: str) -> None:
        """What was put on the bare base is the adapter `name`, and has its turn."""
        self._held[name], self._here = adapted(self.model), name

    def use(self, name: str | None) -> None:
        """Give `name` its turn; what stood in the model waits as it is."""
        if name == self._here:
            return
        for path, layer in adapted(self.model).items():
            replace(self.model, path, layer.base)
        for path, layer in (self._held[name] if name is not None else {}).items():
            replace(self.model, path, layer)
        self._here = name

    def drop(self, name: str) -> None:
        """Forget an adapter; the base is bare if it was its turn."""
        if name == self._here:
            self.use(None)
        self._held.pop(name, None)
