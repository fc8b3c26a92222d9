"""The contract of a frozen layer, and the matmul that keeps nothing.

Memory of QLoRA in one screen: forward rebuilds W, uses it and drops it; backward asks the layer for W again. What stays
alive between the two is the layer as it is stored. No tensor is saved for backward, so a recompute never has to run
this matmul a second time for its own sake.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.errors import BaseModelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what a base can be frozen from, and rebuilt in


class FrozenMatmul(torch.autograd.Function):
    """x W^T + bias; backward gives grad W, and nothing for the frozen layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FrozenLinear") -> Tensor:
        """Give [..., O] for x [..., I]; the layer is remembered, no tensor is."""
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        """Give grad_x [..., I] for grad [..., O]."""
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad @ ctx.layer.weight(grad.dtype, after=grad.detach()), None


class FrozenLinear(nn.Module):
    """y = x W^T + bias with W frozen: state in ordinary parameters that need no gradient, W rebuilt by `weight`.

    A frozen layer may change its device, never its types: `model.to(dtype)` leaves every stored byte as it is.
    """

    bias: nn.Parameter | None
    fetch: Callable[[], None] | None = None  # brings the stored tensors to the device, where they come and go
    home: torch.device | None = None  # where it computes, if its tensors may wait elsewhere

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.register_parameter("bias", None if bias is None else frozen(bias))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.home or next(self.parameters()).device

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype`, rebuilt on every call; `after` is a tensor that W may wait for.

        Backward passes its gradient as `after`: without it torch.compile merges both calls and keeps W in between.
        """
        raise NotImplementedError

    def stored(self) -> dict[str, nn.Parameter]:
        """The tensors that W is rebuilt from, by name, the bias left out; what they hold is there now."""
        if self.fetch is not None:
            self.fetch()
        return {name: value for name, value in self._parameters.items() if value is not None and name != "bias"}

    def forward(self, x: Tensor) -> Tensor:
        """Give y [..., O] for x [..., I], computed in x's dtype."""
        return FrozenMatmul.apply(x, self)  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """How W is stored, as JSON: kind, shape, and the settings of the kind."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The description, as print(model) shows it."""
        return ", ".join(f"{name}={value}" for name, value in self.describe().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenLinear":
        """What nn.Module.to and its kin run on every tensor: a change of device is made, a change of type left out."""

        def keep_type(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(keep_type, recurse)
        return self


def frozen(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter that is never trained; shares its memory when it is contiguous."""
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def check_matrix(weight: Tensor) -> None:
    """BaseModelError unless `weight` is a matrix of finite floats that has a row and a column."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise BaseModelError(f"weight: shape {list(weight.shape)}; a linear layer's weight has shape [out, in].")
    if weight.dtype not in FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise BaseModelError(f"weight: {weight.dtype}; a base is frozen from {known}. Give the original checkpoint.")
    if not all(bool(end.isfinite()) for end in torch.aminmax(weight)):
        raise BaseModelError("weight: holds NaN or infinity, which no block can scale. Is the checkpoint file damaged?")
