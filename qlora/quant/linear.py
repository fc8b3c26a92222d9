"""The contract of a frozen layer, and the matmul that saves nothing for backward.

The memory of QLoRA on one screen: forward rebuilds W, uses it and frees it; backward asks the layer for W again. In
between, only the stored form is in memory. Since no tensor is saved for backward, activation checkpointing never has to
run this matmul a second time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.errors import BaseModelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the types of a base model's weights, and of a rebuilt W


class FrozenMatmul(torch.autograd.Function):
    """x W^T + bias; backward gives the gradient of x, and none for the frozen layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FrozenLinear") -> Tensor:
        """Compute y [..., O] of x [..., I]; keeps the layer for backward, no tensor."""
        ctx.layer = layer
        return layer.output(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        """The gradient of x [..., I] from that of y [..., O]."""
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None
        return ctx.layer.input_gradient(grad), None


class FrozenLinear(nn.Module):
    """y = x W^T + bias with W frozen: ordinary parameters that need no gradient, from which `weight` rebuilds W.

    A frozen layer may change its device, never its types: `model.to(dtype)` leaves every stored byte unchanged.
    """

    bias: nn.Parameter | None
    fetch: Callable[[], None] | None = None  # of a streamed or sharded layer: copies its tensors to the device
    compute_device: torch.device | None = None  # of a layer whose tensors may be stored on another device
    product_dtype: torch.dtype | None = None  # of products with W; None: that of x. Input and output keep theirs
    is_used: bool = True  # whether a forward of text alone calls it; the start-up check finds out

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.register_parameter("bias", None if bias is None else frozen(bias))

    @property
    def device(self) -> torch.device:
        """The device that it computes on: that of the stored tensors, which a bias may not share while it moves."""
        stored = (value for name, value in self._parameters.items() if value is not None and name != "bias")
        return self.compute_device or next(stored).device

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype`, rebuilt on every call; `after` is a tensor that must be computed first.

        Backward passes its gradient as `after`: without it torch.compile merges both calls and keeps W in between.
        """
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """X W^T [..., O] of x [..., I], without the bias: factors in `product_dtype`, the result in x's dtype."""
        return multiply(x, self.weight(self.product_dtype or x.dtype).t())

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of x [..., I] from that of the output [..., O], in the latter's dtype."""
        return multiply(grad, self.weight(self.product_dtype or grad.dtype, after=grad.detach()))

    def stored(self) -> dict[str, nn.Parameter]:
        """The tensors that W is rebuilt from, by name, without the bias; fetched to the device first if need be."""
        if self.fetch is not None:
            self.fetch()
        return {name: value for name, value in self._parameters.items() if value is not None and name != "bias"}

    def output(self, x: Tensor) -> Tensor:
        """X W^T + bias [..., O] of x [..., I], without a gradient."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.product_dtype is None:
            return F.linear(x, self.weight(x.dtype), bias)
        y = self.product(x)
        return y if bias is None else y + bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [..., O] of x [..., I] in x's dtype."""
        if not torch.is_grad_enabled():  # a function of autograd costs a token's forward a tenth of its time on a CPU
            return self.output(x)
        return FrozenMatmul.apply(x, self)  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """How W is stored, as JSON: kind, shape, and the settings of the kind."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The description, as print(model) shows it."""
        return ", ".join(f"{name}={value}" for name, value in self.describe().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenLinear":
        """What nn.Module.to, .half, .cuda ... run on every tensor: applies a change of device, ignores one of type."""

        def keep_type(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(keep_type, recurse)
        return self


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """X W [..., O] in x's dtype, of x [..., I] rounded to the dtype of W [I, O].

    Tensor cores add products of float16 in float32. The sums are not rounded to float16 where the device can return
    them: so they can't overflow, and a float32 x needs no cast of the result.
    """
    if weight.dtype == x.dtype:
        return x @ weight
    if x.device.type == "cpu":
        return operand(x, weight.dtype) @ operand(weight, weight.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    if returns_float32(x.device):
        return torch.mm(rows, weight, out_dtype=torch.float32).view(*x.shape[:-1], -1)
    return (rows @ weight).to(x.dtype).view(*x.shape[:-1], -1)


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of a product in `dtype`. On a CPU float16 values are held in float32, in which tensor cores add too.

    A CPU without float16 units takes 7 to 25 times as long to multiply float16 tensors.
    """
    rounded = tensor.to(dtype)
    return rounded.float() if dtype == torch.float16 and tensor.device.type == "cpu" else rounded


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def returns_float32(device: torch.device) -> bool:
    """Whether a product of float16 matrices can be returned in float32 here, tried once with one above 65,504."""
    large = torch.full((16, 16), 128.0, dtype=torch.float16, device=device)
    try:
        return float(torch.mm(large, large, out_dtype=torch.float32)[0, 0]) == 16 * 128.0**2
    except Exception:  # a device, a driver or a version of torch without it
        return False


def frozen(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter that is never trained; shares its memory when it is contiguous."""
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def check_matrix(weight: Tensor) -> None:
    """BaseModelError unless `weight` is a non-empty matrix of finite floats."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise BaseModelError(
            f"weight: found shape {list(weight.shape)}, allowed: [out, in], the shape of a linear layer."
        )
    if weight.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise BaseModelError(
            f"weight: found {weight.dtype}, allowed: {allowed}. Use the original checkpoint of the model."
        )
    if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight)):
        raise BaseModelError("weight: holds NaN or infinity, which can't be quantized. Is the checkpoint file damaged?")
