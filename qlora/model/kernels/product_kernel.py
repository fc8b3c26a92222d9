"""The gated product act(gate) * up in Triton: one kernel forward, one backward that gives both gradients.

Arithmetic in float32, each result rounded as torch rounds it. `gated_product.py` holds the reference.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values of a row that one program computes


@triton.jit  # type: ignore[untyped-decorator]
def _activation(gate, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation and its slope, in float32. ACT: 0 silu, 1 gelu by tanh, 2 gelu by erf."""
    if ACT == 0:
        share = 1.0 / (1.0 + tl.exp(-gate))
        slope = share * (1.0 + gate * (1.0 - share))
    elif ACT == 1:
        cube = gate * gate * gate
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * cube)))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = share + gate * share * (1.0 - share) * inner
    else:
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return gate * share, slope


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    gate, up, out, width, gate_stride, up_stride, ACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Out = act(gate) * up for a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    kind = out.dtype.element_ty
    value, _ = _activation(tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32), ACT)
    factor = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (value.to(kind).to(tl.float32) * factor).to(kind), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    grad, gate, up, gate_out, up_out, width, grad_stride, gate_stride, up_stride, gate_out_stride, up_out_stride,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gate_out = grad * up * act'(gate), up_out = grad * act(gate); `gate_out` may be `grad` itself."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    kind = gate_out.dtype.element_ty
    incoming = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32), ACT)
    factor = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    of_value = (incoming * factor).to(kind).to(tl.float32)
    tl.store(gate_out + row * gate_out_stride + column, (of_value * slope).to(kind), mask=mask)
    of_up = incoming * value.to(kind).to(tl.float32)
    tl.store(up_out + row * up_out_stride + column, of_up.to(kind), mask=mask)


def forward(gate: Tensor, up: Tensor, act: int, out: Tensor) -> None:
    """Fill `out` [N, I] (contiguous) from gate and up [N, I] with contiguous rows."""
    rows, width = gate.shape
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _forward[grid](gate, up, out, width, gate.stride(0), up.stride(0), ACT=act, BLOCK=BLOCK)


def backward(grad: Tensor, gate: Tensor, up: Tensor, act: int, outs: tuple[Tensor, Tensor]) -> None:
    """Fill the gradients of gate and up, all [N, I] with contiguous rows; the first may be `grad` itself."""
    rows, width = gate.shape
    if rows:
        strides = [tensor.stride(0) for tensor in (grad, gate, up, *outs)]
        grid = (rows, triton.cdiv(width, BLOCK))
        _backward[grid](grad, gate, up, *outs, width, *strides, ACT=act, BLOCK=BLOCK)
