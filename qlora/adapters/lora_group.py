"""Adapted matrices that read the same input (query, key and value; gate and up) as one autograd function.

    y_i = x W_i^T + s_i (x A_i^T) B_i^T + bias_i,  dx = sum_i dy_i W_i + [.. s_i dy_i B_i ..] [A_1; A_2; ..]

The matrices A_i are one matrix, so x is read once forward and once for all their gradients, and the gradients of x are
summed in place. Only for plain LoRA without dropout on a GPU, where launches and reads of x count.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.adapters.step_casts import casts_of
from qlora.quant.linear import FrozenLinear
from qlora.utils.owned_gradients import mark_owned
from qlora.utils.rematerialize import Origin, origin_of


class Member(NamedTuple):
    """One matrix of a group."""

    base: FrozenLinear
    scaling: float
    rank: int  # rows of its A
    owner: int  # the id of the adapted layer


def together(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor] | None:
    """The outputs [..., O] of several LoraLinears for x [..., I]; None unless all are plain and train."""
    if not torch.is_grad_enabled() or not all(_joins(layer) for layer in layers):
        return None
    pairs = [layer.pair() for layer in layers]
    members = tuple(
        Member(layer.base, layer.scaling, len(a), id(layer)) for layer, (a, _) in zip(layers, pairs, strict=True)
    )
    outputs: Sequence[Tensor] = _LoraGroup.apply(x, members, origin_of(x), *(side for pair in pairs for side in pair))
    return outputs


def _joins(layer: Any) -> bool:
    """Whether a layer's update is on, without dropout, and its products are in x's dtype."""
    return layer.active and layer.base.product_dtype is None and not (layer.training and layer.dropout)


class _LoraGroup(torch.autograd.Function):
    """(x, A_1, B_1, A_2, B_2, ...) -> (y_1, y_2, ...); saves A, B and x, or what x is rematerialized from."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, members: tuple[Member, ...], origin: Origin | None, *sides: Tensor
    ) -> tuple[Tensor, ...]:
        """X [..., I] -> one [..., O] for each member."""
        ctx.members, ctx.rematerialization = members, origin.rematerialization if origin else None
        ctx.save_for_backward(*sides, *(origin.sources if origin else (x,)))
        joint_a, *scaled_bs = _casts(members, sides, x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        outputs = []
        for member, part, scaled_b in zip(members, _parts(F.linear(rows, joint_a), members), scaled_bs, strict=True):
            output = F.linear(part, scaled_b)
            if member.base.bias is not None:
                output += member.base.bias.to(x.dtype)
            output.addmm_(rows, member.base.weight(x.dtype).t())
            outputs.append(output.view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and float32 ones of every A and B."""
        members, count = ctx.members, 2 * len(ctx.members)
        saved = ctx.saved_tensors  # read once: a recomputed block returns them a single time
        sides, sources = saved[:count], saved[count:]
        x = ctx.rematerialization.run(sources) if ctx.rematerialization else sources[0]
        rows, shape = x.reshape(-1, x.shape[-1]), x.shape
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        joint_a, *scaled_bs = _casts(members, sides, x.dtype)
        grad_reduced = rows.new_empty(len(rows), len(joint_a))
        for part, grad, scaled_b in zip(_parts(grad_reduced, members), flat, scaled_bs, strict=True):
            torch.mm(grad, scaled_b, out=part)
        grad_as = (grad_reduced.t() @ rows).float().split([member.rank for member in members])
        reduced = _parts(F.linear(rows, joint_a), members)
        grad_bs = [
            (part.t() @ grad).float().t() * member.scaling
            for part, grad, member in zip(reduced, flat, members, strict=True)
        ]
        of_sides = [grad for pair in zip(grad_as, grad_bs, strict=True) for grad in pair]
        if not ctx.needs_input_grad[0]:
            return None, None, None, *of_sides
        del x, rows, reduced  # a rematerialized x is as large as the gradient below
        grad_x = flat[0] @ members[0].base.weight(grad_reduced.dtype, after=flat[0])
        for grad, member in zip(flat[1:], members[1:], strict=True):
            grad_x.addmm_(grad, member.base.weight(grad.dtype, after=grad))
        grad_x = grad_x.addmm_(grad_reduced, joint_a).view(shape)
        return mark_owned(grad_x) if ctx.rematerialization else grad_x, None, None, *of_sides


def _parts(reduced: Tensor, members: Sequence[Member]) -> Sequence[Tensor]:
    """The columns of each member of [N, sum of ranks]."""
    parts: Sequence[Tensor] = reduced.split([member.rank for member in members], dim=-1)
    return parts


def _casts(members: Sequence[Member], sides: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """[A_1; A_2; ...] and every s_i B_i in `dtype`."""

    def make() -> Iterator[Tensor]:
        yield torch.cat([a.to(dtype) for a in sides[::2]])
        for b, member in zip(sides[1::2], members, strict=True):
            yield b.to(dtype) * member.scaling

    return casts_of((*(member.owner for member in members), dtype), lambda: tuple(make()))
