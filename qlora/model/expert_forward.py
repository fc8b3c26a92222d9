"""Forward of a layer's experts over frozen stacks: only the experts that tokens visit are dequantized, one at a time.

    y_n = sum_k w_nk down_e(gate(up_e(x_n))),   e = index_nk of the router

Registered with transformers under EXPERTS_FUNCTION. Rows are sorted by expert and put back by permutations whose
gradients are permutations too: sums run over k in order, the same on every device.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora.errors import BaseModelError
from qlora.quant.expert_stack import STACKS, ExpertStack

EXPERTS_FUNCTION = "qlora_experts"


class _TakeRows(torch.autograd.Function):
    """Rows of x [N, H] in `order` [N * K], where row i of the order belongs to token order[i] // K."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.repeats = repeats
        return x[order // repeats]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (order,) = ctx.saved_tensors
        unsorted = torch.empty_like(grad).index_copy_(0, order, grad)
        return unsorted.view(-1, ctx.repeats, grad.shape[-1]).sum(1), None, None


class _PutBack(torch.autograd.Function):
    """Rows [N * K, H] that were taken in `order`, back in the order of tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return torch.empty_like(rows).index_copy_(0, order, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        (order,) = ctx.saved_tensors
        return grad[order], None


def expert_forward(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Y [N, H] of hidden states [N, H], for the experts [N, K] and their weights [N, K] that the router chose."""
    count, repeats = len(experts.down_proj), index.shape[-1]
    visited, order = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(visited, torch.arange(count, device=index.device), right=True)
    bounds = [0, *ends.tolist()]  # the host waits for a GPU here, once a layer
    visits = [end - start for start, end in pairwise(bounds)]
    rows = _TakeRows.apply(hidden, order, repeats).split(visits)  # type: ignore[no-untyped-call]
    outputs = [_one_expert(experts, part, expert) for expert, part in enumerate(rows) if len(part)]
    output = _PutBack.apply(torch.cat(outputs), order).view(len(hidden), repeats, -1)  # type: ignore[no-untyped-call]
    return (output * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)  # type: ignore[no-any-return]


def _one_expert(experts: Any, x: Tensor, expert: int) -> Tensor:
    """What one expert makes of its tokens [N, H]."""
    if experts.has_gate:
        inner = experts._apply_gate(experts.gate_up_proj(x, expert))
    else:
        inner = experts.act_fn(experts.up_proj(x, expert))
    y: Tensor = experts.down_proj(inner, expert)
    return experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", False) else y


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, expert_forward)


def replace_experts(model: nn.Module) -> None:
    """Give every experts module of a model on `meta` a stack of linear layers in place of each 3-D parameter."""
    for module in model.modules():
        if is_experts(module):
            _replace_parameters(module)


def is_experts(module: Any) -> bool:
    """Whether a module's class takes its forward from transformers' registry of experts functions."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "down_proj"))


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Path -> stack, in the model's order; a wrapped one has its wrapper's path."""
    stacks = ((path, module) for path, module in model.named_modules() if isinstance(module, ExpertStack))
    return {path.removesuffix(".base"): module for path, module in stacks}


def _replace_parameters(experts: Any) -> None:
    for name in STACKS:
        parameter = experts._parameters.pop(name, None)
        if parameter is None:
            continue
        bias = experts._parameters.pop(f"{name}_bias", None)
        count, *sizes = parameter.shape
        out_features, in_features = reversed(sizes) if experts.is_transposed else sizes
        options = {"bias": bias is not None, "device": parameter.device, "dtype": parameter.dtype}
        layers = [nn.Linear(in_features, out_features, **options) for _ in range(count)]
        setattr(experts, name, ExpertStack(layers, experts.is_transposed).requires_grad_(False))
    unknown = [name for name, parameter in experts.named_parameters(recurse=False) if parameter.ndim >= 3]
    if unknown:
        raise BaseModelError(f"model: {type(experts).__name__} has the stack {unknown[0]!r}; allowed: {STACKS}.")
    experts.config._experts_implementation = EXPERTS_FUNCTION
