"""A batch whose rows have different adapters: the frozen product once for all rows, each adapter's update for its own.

    y = base(x),    y[rows of a] += update_a(x[rows of a])

Routed tokens have no row, so that experts run once for each adapter of the batch, on the tokens of its rows.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.lora import LoraLinear
from qlora.errors import AdapterError
from qlora.quant.expert_stack import ExpertStack

Name = str | None  # of an adapter; None: the base alone


class BatchRows:
    """The adapter of each row of the current batch: at first one row for each name, then those that are selected."""

    def __init__(self, names: Sequence[Name]) -> None:
        self._all = tuple(names)
        self.names = self._all
        self._indices: dict[tuple[Name, torch.device], Tensor] = {}

    def __len__(self) -> int:
        """Rows of the current batch."""
        return len(self.names)

    def select(self, rows: Sequence[int]) -> None:
        """The next batch has these rows, in this order: indices of the names at the start."""
        self.names = tuple(self._all[row] for row in rows)
        self._indices.clear()

    def of(self, name: Name, device: torch.device) -> Tensor:
        """The indices of an adapter's rows."""
        if (name, device) not in self._indices:
            rows = [row for row, other in enumerate(self.names) if other == name]
            self._indices[name, device] = torch.tensor(rows, dtype=torch.long, device=device)
        return self._indices[name, device]

    def split(self, x: Tensor) -> Tensor:
        """X [N, T, I] as it is, or [N * T, I] as [N, T, I]. AdapterError for another number of sequences."""
        if x.dim() == 2 and len(x) % len(self) == 0:
            return x.view(len(self), -1, x.shape[-1])
        if len(x) != len(self):
            raise AdapterError(f"a batch of {len(x)} sequences, but adapters are named for {len(self)}.")
        return x


class PerRowAdapters(nn.Module):
    """A frozen matrix or another module, with its own adapter's update for each row."""

    def __init__(self, base: nn.Module, layers: Mapping[Name, nn.Module], rows: BatchRows) -> None:
        super().__init__()
        self.base = base
        self._layers, self._rows = tuple(layers.items()), rows  # a tuple: not submodules

    def forward(self, x: Tensor) -> Tensor:
        """X [N, ..., I] -> [N, ..., O], N the number of rows that have a name; or their tokens [N * T, I]."""
        by_row = self._rows.split(x) if x.is_floating_point() else x  # token ids are [N, T]
        y: Tensor = self.base(x)
        output = y.view(*by_row.shape[:2], -1) if y.dim() < by_row.dim() else y
        for name, layer in self._layers:
            own = by_row[self._rows.of(name, x.device)]
            if len(own):
                output = output.index_add(0, self._rows.of(name, y.device), layer_update(layer, own))
        return output.view(y.shape)


class PerRowExperts(nn.Module):
    """The experts of a layer, each row's tokens with its own adapter's updates."""

    def __init__(self, experts: nn.Module, stacks: Mapping[Name, Mapping[str, nn.Module]], rows: BatchRows) -> None:
        super().__init__()
        self._experts = tuple((name, _with_stacks(experts, own)) for name, own in stacks.items())
        self._rows = rows

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Y [N * T, H] of hidden states [N * T, H], for the experts and their weights [N * T, K] of the router."""
        output = torch.empty_like(hidden)
        by_row = self._rows.split(hidden)
        tokens = torch.arange(len(hidden), device=hidden.device).view(by_row.shape[:-1])
        for name, experts in self._experts:
            own = tokens[self._rows.of(name, hidden.device)].flatten()
            if len(own):
                output.index_copy_(0, own, experts(hidden[own], index[own], weights[own]))
        return output


def mounted_per_row(
    model: nn.Module, frozen: Mapping[str, nn.Module], layers: Mapping[Name, Mapping[str, nn.Module]], rows: BatchRows
) -> dict[str, nn.Module]:
    """Path -> the module that takes its place, for every path where an adapter of `layers` has a layer."""
    modules: dict[str, nn.Module] = {}
    owners = dict[str, None]()  # of stacks that an adapter changes
    for path, module in frozen.items():
        members = {name: own[path] for name, own in layers.items() if path in own}
        if members and isinstance(module, ExpertStack):
            owners[_owner(path)] = None
        elif members:
            modules[path] = PerRowAdapters(module, members, rows)
    for owner in owners:
        paths = [path for path in frozen if _owner(path) == owner]
        stacks = {
            name: {path.rpartition(".")[2]: own.get(path, frozen[path]) for path in paths}
            for name, own in layers.items()
        }
        modules[owner] = PerRowExperts(model.get_submodule(owner), stacks, rows)
    return modules


def layer_update(layer: nn.Module, x: Tensor) -> Tensor:
    """What an adapted layer adds to its base's output for x [..., I], in x's dtype."""
    if type(layer) is LoraLinear:
        a, b = (side.to(x.dtype) for side in layer.pair())
        return F.linear(F.linear(x, a), b * layer.scaling)
    return layer(x) - layer.base(x)  # type: ignore[operator,no-any-return]


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def _with_stacks(experts: Any, stacks: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of an experts module with some of its stacks replaced: everything else is shared."""
    copied = copy.copy(experts)
    copied._modules = {**experts._modules, **stacks}
    return copied  # type: ignore[no-any-return]
