"""The arithmetic of one adapted matrix: a low-rank branch and a frozen product as two functions that keep x, A and B.

They are two so that a recomputed block can stop between them: autograd keeps a function's tensors when its forward
ends, so what the branch keeps is there before the frozen product, the dear one, has begun.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.quant.linear import FrozenLinear
from qlora.utils.rematerialize import Origin


class LoraScale(NamedTuple):
    """How much of the update there is: its factor, and the share of x that training leaves out."""

    scaling: float
    dropout: float


class Branch(torch.autograd.Function):
    """(x, A, B) -> (s B A dropout(x), x): the update, and x passed on so that both gradients meet here in one product.

    Keeps A, B and x, or what x is made again from. A x and the dropout mask are made again in backward. Gradients of A
    and B are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, strength: LoraScale, origin: Origin | None
    ) -> tuple[Tensor, Tensor]:
        """X [..., I], a [R, I], b [O, R] -> [..., O] and x."""
        scaling, dropout = ctx.scaling, ctx.dropout = strength
        ctx.replay = origin.replay if origin else None
        ctx.set_materialize_grads(False)
        ctx.seed = int(torch.randint(2**62, ()).item()) if dropout else 0
        ctx.save_for_backward(a, b, *(origin.sources if origin else (x,)))
        reduced = F.linear(_dropped(x, dropout, ctx.seed), a.to(x.dtype))
        return F.linear(reduced, b.to(x.dtype) * scaling), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b from those of the update [..., O] and of the passed-on x [..., I]."""
        a, b, *sources = ctx.saved_tensors
        x = ctx.replay.again(sources) if ctx.replay else sources[0]
        of_update = grads[0].reshape(-1, grads[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        # Every product below has its long side first and [R, ...] second, which is what matmuls are fast at.
        scaled, narrow = (b.to(x.dtype) * ctx.scaling).t().contiguous(), a.to(x.dtype)
        of_reduced = F.linear(of_update, scaled)  # [N, R]
        dropped = _dropped(rows, ctx.dropout, ctx.seed)
        of_a = (of_reduced.t() @ dropped).float()
        of_b = (F.linear(dropped, narrow).t() @ of_update).float().t() * ctx.scaling
        if not ctx.needs_input_grad[0]:
            return None, of_a, of_b, None, None
        of_x = grads[1].reshape(rows.shape)
        if not ctx.dropout:
            return torch.addmm(of_x, of_reduced, narrow).view_as(x), of_a, of_b, None, None
        return (of_x + _dropped(of_reduced @ narrow, ctx.dropout, ctx.seed)).view_as(x), of_a, of_b, None, None


class Accumulate(torch.autograd.Function):
    """(update, x) -> update + x W^T + bias, in the update's own memory; keeps no tensor, asks for W again later."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor, layer: FrozenLinear) -> Tensor:
        """Update [..., O], x [..., I] -> [..., O]."""
        ctx.layer = layer
        ctx.mark_dirty(update)
        if layer.bias is not None:
            update += layer.bias.to(update.dtype)
        rows, out = x.reshape(-1, x.shape[-1]), update.view(-1, update.shape[-1])
        out.addmm_(rows, layer.weight(x.dtype).t())
        return update

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The gradient goes to the update as it is, and to x through W."""
        (grad,) = grads
        of_x = grad @ ctx.layer.weight(grad.dtype, after=grad.detach()) if ctx.needs_input_grad[1] else None
        return grad, of_x, None


def _dropped(x: Tensor, probability: float, seed: int) -> Tensor:
    """X with dropout of a given seed: the same mask whenever it is asked for."""
    if not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, device=x.device).uniform_(generator=generator) >= probability
    return x * keep.to(x.dtype) / (1 - probability)
