"""Injection: find the target matrices of a frozen model, wrap each in an adapter, count the parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.expert_targets import FROZEN, adaptable
from qlora.adapters.lora import Lora, LoraLinear
from qlora.adapters.patterns import refuse_unused
from qlora.adapters.target_modules import select
from qlora.model.linear_layers import frozen_linears, layers_left_out
from qlora.model.module_tree import set_by_path
from qlora.quant.expert_stack import ExpertStack
from qlora.quant.linear import FrozenLinear


@dataclass(frozen=True)
class Injection:
    """What was adapted: module paths in order, and how many parameters train of how many."""

    paths: tuple[str, ...]
    linear_layers: int  # frozen matrices of the decoder outside the experts, adapted or not
    trainable_parameters: int
    parameters: int  # of the model without adapters; a packed matrix counts its weights, not its bytes
    trained_modules: tuple[str, ...] = ()  # paths of modules whose own weights train, or some of their rows
    expert_stacks: int = 0  # of the paths: those of all experts of a layer at once
    adapted_experts: int = 0  # matrices of experts that have an update; their stacks are among the paths
    expert_matrices: int = 0  # of all experts, adapted or not

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.parameters
        if not self.paths:
            return f"all {self.trainable_parameters:,} parameters of the decoder and the head train ({share:.2f} %)"
        modules = self.trained_modules
        more = f" and in {', '.join(modules[:3])}{' ...' * (len(modules) > 3)}" if modules else ""
        return (
            f"{self.trainable_parameters:,} trainable parameters, {share:.2f} % of the base's {self.parameters:,}, "
            f"in {self._linear_layers()}{self._experts()}{more}"
        )

    def _linear_layers(self) -> str:
        return f"{len(self.paths) - self.expert_stacks} of {self.linear_layers} linear layers"

    def _experts(self) -> str:
        if not self.expert_matrices:
            return ""
        frozen = "; router frozen, its auxiliary loss is 0"
        return f" and {self.adapted_experts:,} of {self.expert_matrices:,} expert matrices{frozen}"


def inject(model: nn.Module, adapter: Lora, targets: str | Sequence[str], seed: int) -> Injection:
    """Wrap every target of `model` and initialize the adapters from `seed`, in the order of the layers.

    A stack of experts is one target. AdapterError, with the nearest names, if one of the patterns matches no frozen
    linear layer, or only layers that their class uses in ways of its own.
    """
    candidates, left_out = adaptable(model), layers_left_out(model)
    if not adapter.expert_rank:
        left_out |= {path: FROZEN for path, frozen in candidates.items() if isinstance(frozen, ExpertStack)}
    paths = select([path for path in candidates if path not in left_out], targets, left_out)
    refuse_unused("adapter.rank_pattern", adapter.rank_pattern, paths)
    refuse_unused("adapter.alpha_pattern", adapter.alpha_pattern, paths)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = _wrapped(adapter, path, candidates[path])
        layer.reset(generator)
        set_by_path(model, path, layer)
    return count(model)


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """Path -> adapted layer, in the model's order; without experts."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapted_experts(model: nn.Module) -> dict[str, ExpertLora]:
    """Path -> adapted stack of experts, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ExpertLora)}


def count(model: nn.Module, linear_layers: int | None = None) -> Injection:
    """Count trainable and frozen parameters of an adapted model."""
    stacks = adapted_experts(model)
    wrappers = (path for path, module in model.named_modules() if isinstance(module, LoraLinear | ExpertLora))
    frozen, matrices = frozen_linears(model), adaptable(model)
    experts = [len(module) for module in matrices.values() if isinstance(module, ExpertStack)]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inside = {id(parameter) for layer in frozen.values() for parameter in layer.parameters()}
    plain = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in inside and not parameter.requires_grad
    )
    packed = sum(layer.out_features * (layer.in_features + (layer.bias is not None)) for layer in frozen.values())
    return Injection(
        tuple(wrappers),
        linear_layers or len(matrices) - len(experts),
        trainable,
        plain + packed,
        expert_stacks=len(stacks),
        adapted_experts=sum(len(layer.base) for layer in stacks.values()),
        expert_matrices=sum(experts),
    )


def _wrapped(adapter: Lora, path: str, frozen: nn.Module) -> LoraLinear | ExpertLora:
    """A frozen matrix, or the experts of a layer, with an untrained update."""
    if isinstance(frozen, ExpertStack):
        return adapter.for_experts(path).wrap_experts(frozen)
    assert isinstance(frozen, FrozenLinear)
    return adapter.for_module(path).wrap(frozen)
