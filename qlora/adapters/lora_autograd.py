"""Autograd functions of one adapted matrix: the low-rank branch, and the frozen product added to it.

They are two functions so that activation checkpointing can stop between them: autograd stores a function's tensors
when its forward ends, so what the branch saves exists before the expensive frozen product starts.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.adapters.step_casts import casts_of
from qlora.quant.linear import FrozenLinear
from qlora.utils.owned_gradients import is_owned, mark_owned
from qlora.utils.rematerialize import Origin


class LoraScale(NamedTuple):
    """The update's factor s, the dropout probability on x, and the key under which a step keeps the layer's casts."""

    scaling: float
    dropout: float
    owner: Hashable | None = None


class LoraBranch(torch.autograd.Function):
    """(x, A, B) -> (s B A dropout(x), x): the update, and x again, so that both gradients of x meet in one product.

    Saves A, B and x, or what x is rematerialized from. A x and the dropout mask are recomputed in backward. Gradients
    of A and B are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: LoraScale, origin: Origin | None
    ) -> tuple[Tensor, Tensor]:
        """X [..., I], a [R, I], b [O, R] -> [..., O] and x."""
        ctx.scale, dropout = scale, scale.dropout
        ctx.rematerialization = origin.rematerialization if origin else None
        ctx.set_materialize_grads(False)
        ctx.seed = int(torch.randint(2**62, ()).item()) if dropout else 0
        ctx.save_for_backward(a, b, *(origin.sources if origin else (x,)))
        narrow_a, scaled_b = _casts(a, b, scale, x.dtype)
        return F.linear(F.linear(_dropout(x, dropout, ctx.seed), narrow_a), scaled_b), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b from those of the update [..., O] and of the returned x [..., I]."""
        a, b, *sources = ctx.saved_tensors
        x = ctx.rematerialization.run(sources) if ctx.rematerialization else sources[0]
        grad_update = grads[0].reshape(-1, grads[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        narrow_a, scaled_b = _casts(a, b, ctx.scale, x.dtype)
        scaling, dropout = ctx.scale.scaling, ctx.scale.dropout
        # Every product below has its long side first and [R, ...] second, which is what matmuls are fast at.
        transposed = scaled_b.t() if x.is_cuda else scaled_b.t().contiguous()
        grad_reduced = F.linear(grad_update, transposed)  # [N, R]
        dropped = _dropout(rows, dropout, ctx.seed)
        grad_a = (grad_reduced.t() @ dropped).float()
        grad_b = (F.linear(dropped, narrow_a).t() @ grad_update).float().t() * scaling
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None
        shape = x.shape
        del x, rows, dropped  # a rematerialized x is as large as the gradient below
        grad_x = grads[1].reshape(-1, shape[-1])
        if dropout:
            grad_x = grad_x + _dropout(grad_reduced @ narrow_a, dropout, ctx.seed)
        elif is_owned(grads[1]):
            grad_x.addmm_(grad_reduced, narrow_a)
        else:
            grad_x = torch.addmm(grad_x, grad_reduced, narrow_a)
        grad_x = grad_x.view(shape)
        # To the function that x is rematerialized by, which is the only one that reads it.
        return mark_owned(grad_x) if ctx.rematerialization else grad_x, grad_a, grad_b, None, None


class AddFrozenMatmul(torch.autograd.Function):
    """(update, x) -> update + x W^T + bias, in the update's memory; saves no tensor, backward dequantizes W again."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor, layer: FrozenLinear) -> Tensor:
        """Update [..., O], x [..., I] -> [..., O]."""
        ctx.layer = layer
        ctx.mark_dirty(update)
        if layer.bias is not None:
            update += layer.bias.to(update.dtype)
        rows, out = x.reshape(-1, x.shape[-1]), update.view(-1, update.shape[-1])
        if layer.product_dtype is None:
            out.addmm_(rows, layer.weight(x.dtype).t())
        else:
            out.add_(layer.product(rows))
        return update

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The update's gradient is the output's; x's is its product with W."""
        (grad,) = grads
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        return grad, mark_owned(ctx.layer.input_gradient(grad)), None  # read by LoraBranch


def _casts(a: Tensor, b: Tensor, scale: LoraScale, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and s B in `dtype`."""

    def make() -> tuple[Tensor, ...]:
        return a.to(dtype), b.to(dtype) * scale.scaling

    narrow_a, scaled_b = make() if scale.owner is None else casts_of((scale.owner, dtype), make)
    return narrow_a, scaled_b


def _dropout(x: Tensor, probability: float, seed: int) -> Tensor:
    """Dropout of x with a mask that depends on the seed alone."""
    if not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, device=x.device).uniform_(generator=generator) >= probability
    return x * keep.to(x.dtype) / (1 - probability)
