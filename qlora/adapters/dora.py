"""DoRA (arXiv:2402.09353): the norm of each row of W + s B A is trained, LoRA changes the row's direction.

The norms in the denominator are the current ones and constant in backward (the paper's section 4.3, and PEFT). They are
computed without W + s B A: |w + s b A|^2 = |w|^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T, where |w|^2 never changes, and
W A^T is a product of rank R with the W that forward dequantizes anyway.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.lora import Lora, LoraLinear
from qlora.adapters.lora_autograd import LoraBranch, LoraScale
from qlora.errors import AdapterError
from qlora.quant.expert_stack import ExpertStack
from qlora.quant.linear import FrozenLinear, multiply
from qlora.utils.rematerialize import origin_of

NO_EXPERTS = (
    "adapter.kind: dora can't adapt experts, for which PEFT's format has no magnitudes. Use kind: lora, or "
    "adapter.expert_rank: 0, which leaves the experts frozen."
)
MIN_SQUARED_NORM = torch.finfo(torch.float32).tiny  # a row with a smaller one counts as zero


class ScaleByMagnitude(torch.autograd.Function):
    """(update, x, m) -> m / |W + s B A| (x W^T + update), in the update's memory; W is dequantized once each way.

    Saves its output, from which m's gradient follows. A row whose m is 0 gives 0 and stays 0.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor, magnitude: Tensor, layer: "DoraLinear") -> Tensor:
        """Update [..., O], x [..., I], magnitude [O] -> [..., O]."""
        ctx.base = layer.base
        ctx.mark_dirty(update)
        product_dtype = layer.base.product_dtype or x.dtype
        weight = layer.base.weight(product_dtype)
        ratio = magnitude / layer.row_norms(weight)
        rows, out = x.reshape(-1, x.shape[-1]), update.view(-1, update.shape[-1])
        if product_dtype == x.dtype:
            out.addmm_(rows, weight.t())
        else:
            out.add_(multiply(rows, weight.t()))
        out.mul_(ratio)  # float32 times 16 bit, rounded once: a ratio is often 1.00x
        ctx.save_for_backward(update, magnitude, ratio)
        return update

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of update, x and magnitude (float32)."""
        (grad,), (out, magnitude, ratio) = grads, ctx.saved_tensors
        grad_update = grad * out
        sums = grad_update.reshape(-1, len(magnitude)).sum(0, dtype=torch.float32)
        grad_magnitude = torch.where(magnitude == 0, 0.0, sums / magnitude)
        torch.mul(grad, ratio, out=grad_update)
        grad_x = ctx.base.input_gradient(grad_update) if ctx.needs_input_grad[1] else None
        return grad_update, grad_x, grad_magnitude, None


class DoraLinear(LoraLinear):
    """y = m / |W + s B A| (x (W + s B A)^T) + bias, row by row; m [O] starts as the row norms: at the base's output.

    Dropout is on what the adapter adds to the base, the rescaling of W x included, as in the paper's code and in PEFT;
    it takes a second product with W.
    """

    squared_norms: Tensor

    def __init__(self, base: FrozenLinear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base, rank, scaling, dropout)
        with torch.no_grad():
            squared_norms = torch.linalg.vector_norm(base.weight(torch.float32), dim=1).square()
        self.register_buffer("squared_norms", squared_norms, persistent=False)
        self.magnitude = nn.Parameter(squared_norms.sqrt())

    def reset(self, generator: torch.Generator) -> None:
        """Initialize A and B as in LoRA, m as the row norms."""
        super().reset(generator)
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set m to the current row norms, so that forward gives W + s B A."""
        self.magnitude.copy_(self.row_norms(self.base.weight(torch.float32)))

    def row_norms(self, weight: Tensor) -> Tensor:
        """|W + s B A| row by row, float32 [O], from W [O, I] in any dtype."""
        a, b = (side.detach() for side in self.pair())
        cross = (b * (weight @ a.t().to(weight.dtype))).sum(1)
        update = (b @ (a @ a.t()) * b).sum(1)
        squares = self.squared_norms + 2 * self.scaling * cross + self.scaling**2 * update
        return squares.clamp_min(MIN_SQUARED_NORM).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O], both in the base's compute dtype."""
        if not self.active:
            return self.base(x)  # type: ignore[no-any-return]
        dropping = self.training and self.dropout > 0
        dropped = F.dropout(x, self.dropout) if dropping else x
        update, x_out = LoraBranch.apply(dropped, *self.pair(), LoraScale(self.scaling, 0.0), origin_of(dropped))
        y: Tensor = ScaleByMagnitude.apply(update, x_out if dropped.requires_grad else dropped, self.magnitude, self)
        if dropping:
            return y + self.base(x - dropped)  # type: ignore[no-any-return]
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def delta(self) -> Tensor:
        """M / |W + s B A| (W + s B A) - W [O, I] in float32."""
        weight = self.base.weight(torch.float32)
        return scale_rows(weight + super().delta(), self.magnitude.detach()) - weight


def scale_rows(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of `weight` [O, I] scaled to the norms `magnitude` [O], float32; a row of zeros stays zero."""
    norms = torch.linalg.vector_norm(weight, dim=1).square().clamp_min(MIN_SQUARED_NORM).sqrt()
    ratio: Tensor = magnitude / norms
    return weight * ratio[:, None]


@dataclass(frozen=True)
class Dora(Lora):
    """Settings of DoRA; builds one DoraLinear per frozen matrix."""

    def wrap(self, base: FrozenLinear) -> DoraLinear:
        """`base` with an untrained update, and the norms of its rows as magnitude."""
        return DoraLinear(base, self.rank, self.scaling, self.dropout)

    def wrap_experts(self, base: ExpertStack) -> ExpertLora:
        """AdapterError: PEFT's format has no magnitudes of experts."""
        raise AdapterError(NO_EXPERTS)
