"""Several adapters trained in turn on one base: each keeps its layers, and one of them is active at a time.

The active adapter is the one whose layers are modules of the model: nothing is copied, the frozen matrices are shared,
and an active adapter's parameters have the same names as if it were the only one.
"""

from collections.abc import Mapping

from torch import nn

from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.inject import adapted, adapted_experts
from qlora.adapters.lora import LoraLinear
from qlora.model.module_tree import set_by_path


class RoundRobin:
    """The adapters of one base by name; None is the base without an adapter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layers: dict[str, Mapping[str, LoraLinear | ExpertLora]] = {}
        self._active: str | None = None

    def add(self, name: str) -> None:
        """Register the adapter that was just injected as `name`; it is active."""
        self._layers[name], self._active = self._adapted(), name

    def activate(self, name: str | None) -> None:
        """Put the layers of `name` into the model instead of those of the active adapter."""
        if name == self._active:
            return
        for path, layer in self._adapted().items():
            set_by_path(self.model, path, layer.base)
        for path, layer in (self._layers[name] if name is not None else {}).items():
            set_by_path(self.model, path, layer)
        self._active = name

    def remove(self, name: str) -> None:
        """Forget an adapter; if it was active, none is."""
        if name == self._active:
            self.activate(None)
        self._layers.pop(name, None)

    def _adapted(self) -> dict[str, LoraLinear | ExpertLora]:
        return {**adapted(self.model), **adapted_experts(self.model)}
