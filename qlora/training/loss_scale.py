"""Dynamic loss scaling for float16: gradients that would vanish in float16 are computed times a power of two.

Equal to torch.amp.GradScaler step for step, down to a scale of 1: a step whose gradients are not finite is skipped and
halves the scale, GROWTH_INTERVAL finite ones in a row double it. The scale is a pure function of what came before, and
a part of Position: it is saved with a checkpoint, and equal on every rank, since all see one gradient norm.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

INITIAL, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000  # GradScaler's defaults
SMALLEST, LARGEST = 1.0, 2.0**127  # GradScaler has no lower end; its scale is a float32


@dataclass(frozen=True)
class LossScale:
    """The scale of the next step, and the finite steps since it last changed."""

    value: float = INITIAL
    finite_steps: int = 0

    def after(self, is_finite: bool, interval: int = GROWTH_INTERVAL) -> "LossScale":
        """The scale after one more step, whose gradients were all finite or not."""
        if not is_finite:
            return LossScale(max(SMALLEST, self.value * BACKOFF))
        steps = self.finite_steps + 1
        if steps < interval:
            return LossScale(self.value, steps)
        return LossScale(min(LARGEST, self.value * GROWTH))

    @property
    def reason(self) -> str:
        """Why a step at this scale was skipped."""
        return f"gradients overflow float16 at a loss scale of {self.value:,.0f}, which is halved"

    def is_overflow(self, grad_norm: float, loss: float) -> bool:
        """Whether a smaller scale may help: the loss is finite, its scaled gradients are not."""
        return self.value > SMALLEST and math.isfinite(loss) and not math.isfinite(grad_norm)


UNSCALED = LossScale(SMALLEST)


def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Divide the gradients by the scale, in place: exact, since it is a power of two."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1.0 and gradients:
        torch._foreach_mul_(gradients, 1.0 / scale)
