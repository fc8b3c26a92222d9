"""Which frozen matrices get an adapter: find the targets, wrap them, report the count."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import nn

from qlora.adapters.lora import LoraLinear
from qlora.errors import AdapterError
from qlora.quant.linear import FrozenLinear


class Wrapper(Protocol):
    """Anything of the ADAPTERS table."""

    def wrap(self, base: FrozenLinear) -> Any:
        """The frozen matrix with an adapter beside it."""


@dataclass(frozen=True)
class Injection:
    """What was adapted: module paths in order, and how many weights train of how many."""

    paths: tuple[str, ...]
    linear_layers: int  # frozen matrices of the decoder, adapted or not
    trainable_parameters: int
    parameters: int  # of the whole model, adapters left out; a packed matrix counts its weights, not its bytes

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.parameters
        return (
            f"{self.trainable_parameters:,} trainable parameters, {share:.2f} % of the base's {self.parameters:,}, "
            f"in {len(self.paths)} of {self.linear_layers} linear layers"
        )


def inject(model: nn.Module, adapter: Wrapper, targets: str | Sequence[str], seed: int) -> Injection:
    """Wrap every target of `model` and initialise the adapters from `seed`, in the order of the layers.

    AdapterError, with the nearest names, if one of the patterns matches no frozen linear layer.
    """
    frozen = frozen_linears(model)
    paths = select(frozen, targets)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = adapter.wrap(frozen[path])
        layer.reset(generator)
        replace(model, path, layer)
    return count(model, len(frozen))


def frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    """Path -> frozen matrix, in the model's order; a wrapped one is found under its wrapper's path."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, FrozenLinear))
    return {path.removesuffix(".base"): module for path, module in found}


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """Path -> adapted layer, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def select(paths: Sequence[str] | dict[str, FrozenLinear], targets: str | Sequence[str]) -> list[str]:
    """The paths that `targets` means: `all-linear`, a list of names (paths or their ends), or one pattern."""
    known = list(paths)
    if targets == "all-linear":
        return known
    if isinstance(targets, str):
        return _matching(known, targets, _pattern(targets).fullmatch)
    chosen = {path for name in targets for path in _matching(known, name, _ends_with(name))}
    return [path for path in known if path in chosen]


def count(model: nn.Module, linear_layers: int | None = None) -> Injection:
    """Count trainable and frozen weights of an adapted model."""
    paths = tuple(adapted(model))
    frozen = frozen_linears(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inside = {id(parameter) for layer in frozen.values() for parameter in layer.parameters()}
    plain = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in inside and not parameter.requires_grad
    )
    packed = sum(layer.out_features * (layer.in_features + (layer.bias is not None)) for layer in frozen.values())
    return Injection(paths, linear_layers or len(frozen), trainable, plain + packed)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _matching(known: list[str], name: str, matches: Any) -> list[str]:
    found = [path for path in known if matches(path)]
    if found:
        return found
    leaves = sorted({path.rpartition(".")[2] for path in known})
    near = get_close_matches(name, leaves, n=1)
    hint = f" Did you mean [{near[0]}]?" if near else ""
    raise AdapterError(
        f"adapter.targets: {name!r} matches no linear layer of the decoder.{hint} "
        f"Layers: {', '.join(leaves)}. Allowed: all-linear, a list of names, or one regular expression for whole paths "
        f"such as {known[0] if known else 'model.layers.0.mlp.up_proj'}."
    )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise AdapterError(f"adapter.targets: {text!r} is no regular expression: {error}.") from error


def _ends_with(name: str) -> Any:
    return lambda path: path == name or path.endswith(f".{name}")
