"""Injection: find the target matrices of a frozen model, wrap each in an adapter, count the parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora.adapters.lora import Lora, LoraLinear
from qlora.adapters.patterns import refuse_unused
from qlora.adapters.target_modules import select
from qlora.model.linear_layers import frozen_linears, layers_left_out
from qlora.model.module_tree import set_by_path


@dataclass(frozen=True)
class Injection:
    """What was adapted: module paths in order, and how many parameters train of how many."""

    paths: tuple[str, ...]
    linear_layers: int  # frozen matrices of the decoder, adapted or not
    trainable_parameters: int
    parameters: int  # of the model without adapters; a packed matrix counts its weights, not its bytes
    trained_modules: tuple[str, ...] = ()  # paths of modules whose own weights train, or some of their rows

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.parameters
        if not self.paths:
            return f"all {self.trainable_parameters:,} parameters of the decoder and the head train ({share:.2f} %)"
        modules = self.trained_modules
        more = f" and in {', '.join(modules[:3])}{' ...' * (len(modules) > 3)}" if modules else ""
        return (
            f"{self.trainable_parameters:,} trainable parameters, {share:.2f} % of the base's {self.parameters:,}, "
            f"in {len(self.paths)} of {self.linear_layers} linear layers{more}"
        )


def inject(model: nn.Module, adapter: Lora, targets: str | Sequence[str], seed: int) -> Injection:
    """Wrap every target of `model` and initialize the adapters from `seed`, in the order of the layers.

    AdapterError, with the nearest names, if one of the patterns matches no frozen linear layer, or only layers that
    their class uses in ways of its own.
    """
    frozen, left_out = frozen_linears(model), layers_left_out(model)
    paths = select([path for path in frozen if path not in left_out], targets, left_out)
    refuse_unused("adapter.rank_pattern", adapter.rank_pattern, paths)
    refuse_unused("adapter.alpha_pattern", adapter.alpha_pattern, paths)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = adapter.for_module(path).wrap(frozen[path])
        layer.reset(generator)
        set_by_path(model, path, layer)
    return count(model, len(frozen))


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """Path -> adapted layer, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def count(model: nn.Module, linear_layers: int | None = None) -> Injection:
    """Count trainable and frozen parameters of an adapted model."""
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
