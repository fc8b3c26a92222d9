"""Which frozen matrices get an adapter: find the targets, wrap them, report the count."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora.adapters.lora import Lora, LoraLinear
from qlora.adapters.patterns import refuse_idle
from qlora.adapters.target_modules import select
from qlora.quant.linear import FrozenLinear


@dataclass(frozen=True)
class Injection:
    """What was adapted: module paths in order, and how many weights train of how many."""

    paths: tuple[str, ...]
    linear_layers: int  # frozen matrices of the decoder, adapted or not
    trainable_parameters: int
    parameters: int  # of the whole model, adapters left out; a packed matrix counts its weights, not its bytes
    whole: tuple[str, ...] = ()  # paths of modules that train whole, or some of whose rows do

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.parameters
        if not self.paths:
            return f"all {self.trainable_parameters:,} parameters of the decoder and the head train ({share:.2f} %)"
        more = f" and in {', '.join(self.whole[:3])}{' ...' * (len(self.whole) > 3)}" if self.whole else ""
        return (
            f"{self.trainable_parameters:,} trainable parameters, {share:.2f} % of the base's {self.parameters:,}, "
            f"in {len(self.paths)} of {self.linear_layers} linear layers{more}"
        )


def inject(model: nn.Module, adapter: Lora, targets: str | Sequence[str], seed: int) -> Injection:
    """Wrap every target of `model` and initialise the adapters from `seed`, in the order of the layers.

    AdapterError, with the nearest names, if one of the patterns matches no frozen linear layer.
    """
    frozen = frozen_linears(model)
    paths = select(frozen, targets)
    refuse_idle("adapter.rank_pattern", adapter.rank_pattern, paths)
    refuse_idle("adapter.alpha_pattern", adapter.alpha_pattern, paths)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = adapter.at(path).wrap(frozen[path])
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
