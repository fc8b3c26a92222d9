"""A second adapter of the same base that does not train: the reference of an objective, and where training starts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from qlora.adapters import peft_files
from qlora.adapters.attach import build_layers
from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted, adapted_experts
from qlora.adapters.lora import LoraLinear
from qlora.errors import AdapterError
from qlora.model.linear_layers import frozen_linears
from qlora.model.module_tree import set_by_path


class ReferenceAdapter:
    """The layers of an adapter file, around the frozen matrices that the trained adapter shares."""

    def __init__(self, model: nn.Module, file: peft_files.AdapterFile, base_sha256: str) -> None:
        """AdapterError if the file is of another base, or one of the two adapters has updates of experts."""
        if adapted_experts(model) or any(".experts." in path for path in file.pairs):
            raise AdapterError(
                "objective.reference: an adapter of experts can't be a reference in a folder. Use base, or train and "
                "name adapters with adapter.expert_rank: 0."
            )
        layers, self.note = build_layers(model, file, base_sha256)
        self._model, self._frozen, self._file = model, frozen_linears(model), file
        self._layers: Mapping[str, nn.Module] = layers
        for layer in layers.values():
            layer.eval().requires_grad_(False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the model computes what it does with this adapter in place of the trained one."""
        trained = adapted(self._model)
        before = {path: self._model.get_submodule(path) for path in {**trained, **self._layers}}
        for path in before:
            set_by_path(self._model, path, self._layers.get(path) or self._frozen[path])
        try:
            yield
        finally:
            for path, module in before.items():
                set_by_path(self._model, path, module)

    @torch.no_grad()
    def copy_to_trained(self) -> None:
        """Overwrite the trained adapter with this one. AdapterError if it has other layers, ranks or factors."""
        trained = adapted(self._model)
        problem = _difference(trained, self._layers)
        if problem:
            raise AdapterError(
                f"objective.reference: training starts at the reference, but {problem}. Give the recipe the kind, "
                f"rank, alpha and targets of {self._file.folder / peft_files.CONFIG}."
            )
        for path, layer in trained.items():
            source: LoraLinear = self._layers[path]  # type: ignore[assignment]
            layer.load_pair(*source.pair())
            if isinstance(layer, DoraLinear) and isinstance(source, DoraLinear):
                layer.magnitude.copy_(source.magnitude)


def _difference(trained: Mapping[str, LoraLinear], reference: Mapping[str, nn.Module]) -> str | None:
    """Why the layers of one adapter can't be copied to the other's."""
    missing = sorted(trained.keys() ^ reference.keys())
    if missing:
        owner = "the recipe" if missing[0] in trained else "the reference"
        return f"only {owner} adapts {missing[0]}"
    for path, layer in trained.items():
        other = reference[path]
        kinds = [type(item).__name__ for item in (layer, other)]
        if kinds[0] != kinds[1]:
            return f"{path} is a {kinds[0]}, the reference's a {kinds[1]}"
        for name in ("rank", "scaling"):
            values = [getattr(item, name) for item in (layer, other)]
            if abs(values[0] - values[1]) > 1e-6 * abs(values[0]):
                return f"{path} has {name} {values[0]:g}, the reference's {values[1]:g}"
    return None
