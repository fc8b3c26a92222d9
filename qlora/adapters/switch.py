"""Several adapters on one base: held, switched, mixed by weight, one for each row of a batch; and all of them off.

Which adapter acts is which module stands in a layer's place, so a switch moves no number: the base is never touched,
and a layer that no adapter names is the frozen one itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.inject import adapted, frozen_linears
from qlora.adapters.lora import LoraLinear
from qlora.adapters.modules_to_save import SavedModule, saved_modules
from qlora.errors import AdapterError, did_you_mean
from qlora.quant.linear import FrozenLinear

Layers = Mapping[str, nn.Module]  # path -> the adapted layer that goes there


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` is its base."""
    both: list[LoraLinear | SavedModule] = [*adapted(model).values(), *saved_modules(model).values()]
    layers = [layer for layer in both if layer.active]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


class AdapterSwitch:
    """The adapters that one resident base knows by name. None is the base alone; that is also how it starts.

    For answering, not for training: held layers are in evaluation mode and take no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen: dict[str, nn.Module] = {**frozen_linears(model)}
        self._places = {path: _place(model, path) for path in self._frozen}
        self._held: dict[str, Layers] = {}
        self.name: str | None = None
        self.use(None)

    @property
    def names(self) -> list[str]:
        """The adapters that are held, in the order they came."""
        return list(self._held)

    def hold(self, name: str, layers: Layers) -> None:
        """Keep an adapter's layers, made for this base, under `name`; which adapter acts does not change."""
        if name in self._held:
            raise AdapterError(f"adapter {name!r} is held already. Give each adapter a name of its own.")
        for layer in layers.values():
            layer.eval().requires_grad_(False)
        for path, layer in layers.items():
            if isinstance(layer, SavedModule) and path not in self._frozen:
                self._frozen[path], self._places[path] = layer.base, _place(self._model, path)
        self._held[name] = layers

    def use(self, name: str | None) -> None:
        """Let one adapter act, or the base alone. AdapterError, with the nearest name, if there is no such adapter."""
        layers = self._layers(name)
        self._mount({path: layers.get(path, frozen) for path, frozen in self._frozen.items()})
        self.name = name

    def mix(self, weights: Mapping[str, float]) -> None:
        """Let several LoRA adapters act at once, each update times its weight: their directions side by side."""
        chosen = [(self._layers(name), weight) for name, weight in weights.items()]
        mixed: dict[str, nn.Module] = {}
        for path, frozen in self._frozen.items():
            parts = [(_lora(layers[path], path), weight) for layers, weight in chosen if path in layers]
            mixed[path] = _side_by_side(frozen, parts) if parts else frozen
        self._mount(mixed)
        self.name = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside the block row n of every batch goes through adapter `names[n]`; the base's product is made once."""
        groups = [
            (self._layers(name), torch.tensor([row for row, other in enumerate(names) if other == name]))
            for name in dict.fromkeys(names)
        ]
        rows: dict[str, nn.Module] = {}
        for path, frozen in self._frozen.items():
            members = [(layers[path], index) for layers, index in groups if path in layers]
            rows[path] = ByRow(frozen, members, len(names)) if members else frozen
        with self._mounted(rows):
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the base answers alone; afterwards what acted before."""
        with self._mounted(self._frozen):
            yield

    @contextmanager
    def _mounted(self, modules: Layers) -> Iterator[None]:
        before = {path: getattr(parent, leaf) for path, (parent, leaf) in self._places.items()}
        self._mount(modules)
        try:
            yield
        finally:
            self._mount(before)

    def _layers(self, name: str | None) -> Layers:
        if name is None:
            return {}
        if name not in self._held:
            raise AdapterError(f"no adapter is called {name!r}.{did_you_mean(name, self._held)}")
        return self._held[name]

    def _mount(self, modules: Layers) -> None:
        for path, module in modules.items():
            parent, leaf = self._places[path]
            setattr(parent, leaf, module)


class ByRow(nn.Module):
    """y = base(x), and to the rows of each adapter its own update. Replaces a layer inside `AdapterSwitch.rows`."""

    def __init__(self, base: nn.Module, members: Sequence[tuple[nn.Module, Tensor]], rows: int) -> None:
        super().__init__()
        self.base = base
        device = next(base.parameters()).device
        self._members = tuple((layer, index.to(device)) for layer, index in members)  # no submodules: they only visit
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """X [N, ..., I] -> [N, ..., O], N the number of rows that were named."""
        if x.shape[0] != self._rows:
            raise AdapterError(f"a batch of {x.shape[0]} rows, but adapters are named for {self._rows}.")
        y: Tensor = self.base(x)
        for layer, index in self._members:
            y = y.index_add(0, index, update(layer, x[index]))
        return y


def update(layer: nn.Module, x: Tensor) -> Tensor:
    """What an adapted layer adds to its base's output for x [..., I], in x's dtype."""
    if type(layer) is LoraLinear:
        a, b = layer.A.to(x.dtype), layer.B.to(x.dtype) * layer.scaling
        return F.linear(F.linear(x, a), b)
    return layer(x) - layer.base(x)  # type: ignore[operator,no-any-return]


def _side_by_side(frozen: nn.Module, parts: Sequence[tuple[LoraLinear, float]]) -> LoraLinear:
    """One LoRA layer whose update is the weighted sum of several."""
    rank = sum(layer.rank for layer, _ in parts)
    assert isinstance(frozen, FrozenLinear)  # whatever else an adapter may train, `_lora` refuses
    mixed = LoraLinear(frozen, rank, 1.0, 0.0).requires_grad_(False).eval()
    mixed.A.copy_(torch.cat([layer.A for layer, _ in parts]))
    mixed.B.copy_(torch.cat([layer.B * (weight * layer.scaling) for layer, weight in parts], dim=1))
    return mixed


def _lora(layer: nn.Module, path: str) -> LoraLinear:
    if type(layer) is not LoraLinear:
        raise AdapterError(f"{path}: only LoRA updates can be mixed by weight, this one is a {type(layer).__name__}.")
    return layer


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf
