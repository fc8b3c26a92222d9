"""Several adapters on one base: switched, mixed by weight, or one per row of a batch; and all of them disabled.

The active adapter is the one whose layers are modules of the model, so a switch changes no tensor: the base is never
touched, and a layer without an adapter is the frozen one itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.expert_targets import adaptable
from qlora.adapters.inject import adapted, adapted_experts
from qlora.adapters.lora import LoraLinear
from qlora.adapters.modules_to_save import ModuleToSave, modules_to_save
from qlora.adapters.per_row import BatchRows, mounted_per_row
from qlora.errors import AdapterError, did_you_mean
from qlora.model.module_tree import set_by_path
from qlora.quant.expert_stack import ExpertStack
from qlora.quant.linear import FrozenLinear

Layers = Mapping[str, nn.Module]  # path -> adapted layer


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` computes what its base does."""
    layers: list[LoraLinear | ExpertLora | ModuleToSave] = [*adapted(model).values(), *adapted_experts(model).values()]
    layers = [layer for layer in (*layers, *modules_to_save(model).values()) if layer.active]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


class AdapterSwitch:
    """The adapters of one base by name, one of them active. None is the base without an adapter: the initial state.

    For inference, not for training: the layers are in evaluation mode and take no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen: dict[str, nn.Module] = {**adaptable(model)}
        self._adapters: dict[str, Layers] = {}
        self.active: str | None = None
        self.activate(None)

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they were added."""
        return list(self._adapters)

    def add(self, name: str, layers: Layers) -> None:
        """Register an adapter's layers, built for this base, as `name`; the active adapter does not change."""
        if name in self._adapters:
            raise AdapterError(f"adapter {name!r} is loaded already. Give each adapter a different name.")
        for layer in layers.values():
            layer.eval().requires_grad_(False)
        for path, layer in layers.items():
            if isinstance(layer, ModuleToSave) and path not in self._frozen:
                self._frozen[path] = layer.base
        self._adapters[name] = layers

    def activate(self, name: str | None) -> None:
        """Activate one adapter, or the base alone. AdapterError, with the nearest name, for an unknown one."""
        layers = self._layers(name)
        self._mount({path: layers.get(path, frozen) for path, frozen in self._frozen.items()})
        self.active = name

    def mix(self, weights: Mapping[str, float]) -> None:
        """Activate the weighted sum of several LoRA adapters: their A and B concatenated along the rank."""
        chosen = [(self._layers(name), weight) for name, weight in weights.items()]
        mixed: dict[str, nn.Module] = {}
        for path, frozen in self._frozen.items():
            weighted = [(_require_lora(layers[path], path), weight) for layers, weight in chosen if path in layers]
            mixed[path] = _weighted_sum(frozen, weighted) if weighted else frozen
        self._mount(mixed)
        self.active = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())

    @contextmanager
    def per_row(self, names: Sequence[str | None]) -> Iterator[BatchRows]:
        """Inside the block row n of every batch uses adapter `names[n]`; the base's product is computed once.

        The rows of later batches can be selected from these.
        """
        rows, layers = BatchRows(names), {name: self._layers(name) for name in names}
        modules = mounted_per_row(self._model, self._frozen, layers, rows)
        whole = {path: self._model.get_submodule(path) for path in modules if path not in self._frozen}
        with self._mounted({path: modules.pop(path, module) for path, module in self._frozen.items()}):
            self._mount(modules)
            try:
                yield rows
            finally:
                self._mount(whole)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside the block only the base is active; afterwards what was active before."""
        with self._mounted(self._frozen):
            yield

    @contextmanager
    def _mounted(self, modules: Layers) -> Iterator[None]:
        before = {path: self._model.get_submodule(path) for path in self._frozen}
        self._mount(modules)
        try:
            yield
        finally:
            self._mount(before)

    def _layers(self, name: str | None) -> Layers:
        if name is None:
            return {}
        if name not in self._adapters:
            raise AdapterError(f"no adapter is called {name!r}.{did_you_mean(name, self._adapters)}")
        return self._adapters[name]

    def _mount(self, modules: Layers) -> None:
        for path, module in modules.items():
            set_by_path(self._model, path, module)


def _weighted_sum(
    frozen: nn.Module, weighted: Sequence[tuple[LoraLinear | ExpertLora, float]]
) -> LoraLinear | ExpertLora:
    """One LoRA layer whose update is the weighted sum of several."""
    rank = sum(layer.rank for layer, _ in weighted)
    mixed: LoraLinear | ExpertLora
    if isinstance(frozen, ExpertStack):
        mixed = ExpertLora(frozen, rank, 1.0, 0.0)
    else:
        assert isinstance(frozen, FrozenLinear)  # `_require_lora` refuses every other adapted module
        mixed = LoraLinear(frozen, rank, 1.0, 0.0)
    mixed.requires_grad_(False).eval()
    mixed.A.copy_(torch.cat([layer.A for layer, _ in weighted], dim=-2))
    mixed.B.copy_(torch.cat([layer.B * (weight * layer.scaling) for layer, weight in weighted], dim=-1))
    return mixed


def _require_lora(layer: nn.Module, path: str) -> LoraLinear | ExpertLora:
    if type(layer) not in (LoraLinear, ExpertLora):
        raise AdapterError(f"{path}: only LoRA updates can be mixed by weight, this is a {type(layer).__name__}.")
    return layer  # type: ignore[return-value]
