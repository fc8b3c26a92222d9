"""DoRA (arXiv:2402.09353): the length of each row of W + s B A trains by itself, LoRA turns the row's direction.

The lengths that divide are those of the moment and constant in backward (the paper's section 4.3, and PEFT). They come
without W + s B A: |w + s b A|^2 = |w|^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T, where |w|^2 never changes, and W A^T is a
product of rank R with the W that forward rebuilds anyway.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.lora import Lora, LoraLinear
from qlora.adapters.lora_autograd import Branch, LoraScale
from qlora.quant.linear import FrozenLinear
from qlora.utils.rematerialize import origin_of

SHORTEST = torch.finfo(torch.float32).tiny  # squared length below which a row counts as zero


class Magnify(torch.autograd.Function):
    """(update, x, m) -> m / |W + s B A| (x W^T + update), in the update's own memory; W is rebuilt once each way.

    Keeps its output, from which m's gradient follows. A row whose m is 0 gives 0 and stays so.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor, magnitude: Tensor, layer: "DoraLinear") -> Tensor:
        """Update [..., O], x [..., I], magnitude [O] -> [..., O]."""
        ctx.base = layer.base
        ctx.mark_dirty(update)
        weight = layer.base.weight(x.dtype)
        ratio = magnitude / layer.lengths(weight)
        rows, out = x.reshape(-1, x.shape[-1]), update.view(-1, update.shape[-1])
        out.addmm_(rows, weight.t()).mul_(ratio)  # float32 times 16 bit, rounded once: a ratio is often 1.00x
        ctx.save_for_backward(update, magnitude, ratio)
        return update

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of update, x and magnitude (float32)."""
        (grad,), (out, magnitude, ratio) = grads, ctx.saved_tensors
        of_update = grad * out
        summed = of_update.reshape(-1, len(magnitude)).sum(0, dtype=torch.float32)
        of_magnitude = torch.where(magnitude == 0, 0.0, summed / magnitude)
        torch.mul(grad, ratio, out=of_update)
        of_x = of_update @ ctx.base.weight(grad.dtype, after=grad.detach()) if ctx.needs_input_grad[1] else None
        return of_update, of_x, of_magnitude, None


class DoraLinear(LoraLinear):
    """y = m / |W + s B A| (x (W + s B A)^T) + bias, row by row; m [O] starts as the lengths: at the base's output.

    Dropout is on what the adapter adds to the base, the rescaling of W x included, as in the paper's code and in PEFT;
    it takes a second product with W.
    """

    squares: Tensor

    def __init__(self, base: FrozenLinear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base, rank, scaling, dropout)
        with torch.no_grad():
            squares = torch.linalg.vector_norm(base.weight(torch.float32), dim=1).square()
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())

    def reset(self, generator: torch.Generator) -> None:
        """A and B as LoRA starts them, m as long as the rows are."""
        super().reset(generator)
        self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        """Let m be the present lengths, so that forward gives W + s B A."""
        self.magnitude.copy_(self.lengths(self.base.weight(torch.float32)))

    def lengths(self, weight: Tensor) -> Tensor:
        """|W + s B A| row by row, float32 [O], from W [O, I] in any dtype."""
        a, b = (side.detach() for side in self.pair())
        across = (b * (weight @ a.t().to(weight.dtype))).sum(1)
        inside = (b @ (a @ a.t()) * b).sum(1)
        return (self.squares + 2 * self.scaling * across + self.scaling**2 * inside).clamp_min(SHORTEST).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O], both in the base's compute dtype."""
        if not self.active:
            return self.base(x)  # type: ignore[no-any-return]
        dropping = self.training and self.dropout > 0
        read = F.dropout(x, self.dropout) if dropping else x
        update, passed_on = Branch.apply(read, *self.pair(), LoraScale(self.scaling, 0.0), origin_of(read))
        y: Tensor = Magnify.apply(update, passed_on if read.requires_grad else read, self.magnitude, self)
        if dropping:
            return y + self.base(x - read)  # type: ignore[no-any-return]
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def delta(self) -> Tensor:
        """M / |W + s B A| (W + s B A) - W [O, I] in float32."""
        weight = self.base.weight(torch.float32)
        return magnified(weight + super().delta(), self.magnitude.detach()) - weight


def magnified(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of `weight` [O, I] brought to the lengths `magnitude` [O], float32; a row of zeros stays one."""
    lengths = torch.linalg.vector_norm(weight, dim=1).square().clamp_min(SHORTEST).sqrt()
    longer: Tensor = magnitude / lengths
    return weight * longer[:, None]


@dataclass(frozen=True)
class Dora(Lora):
    """Settings of DoRA; builds one DoraLinear per frozen matrix."""

    def wrap(self, base: FrozenLinear) -> DoraLinear:
        """`base` with an untrained update beside it, and the lengths of its rows."""
        return DoraLinear(base, self.rank, self.scaling, self.dropout)
