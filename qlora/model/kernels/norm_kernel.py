"""RMSNorm in Triton: one kernel forward, one backward; each program computes one row, in float32.

Two passes over the row: the second one reads it from the cache. `rms_norm.py` holds the reference.
"""

import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 8192  # values of a row that a program holds at a time


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    x, weight, out, rstd, width, x_stride, eps, FORM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Out = x * rstd * w for the row of this program; FORM: 0 rounds before the weight, 1 after it, 2 adds 1 to it."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * width
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(rstd + row, scale)
    for block in tl.static_range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        mask = column < width
        value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32) * scale
        factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        if FORM == 0:
            value = value.to(out.dtype.element_ty).to(tl.float32)
        if FORM == 2:
            factor += 1.0
        tl.store(out + column, (value * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    grad, x, weight, scale, column, width, dtype: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """A block of a row: g = grad * w, rounded as in forward, and n = x * rstd."""
    mask = column < width
    value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if FORM == 2:
        factor += 1.0
    slope = tl.load(grad + column, mask=mask, other=0.0).to(tl.float32) * factor
    if FORM == 0:
        slope = slope.to(dtype).to(tl.float32)
    return slope, value


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    grad, x, weight, rstd, out, width, grad_stride, x_stride, out_stride,
    FORM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Out = rstd * (g - n * mean(g * n)), g = grad * w, n = x * rstd; `out` may be `grad` itself."""
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_stride
    x += row * x_stride
    out += row * out_stride
    scale = tl.load(rstd + row)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        slope, value = _block(grad, x, weight, scale, column, width, out.dtype.element_ty, FORM)
        products += slope * value
    mean = tl.sum(products, axis=0) / width
    for block in tl.static_range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        slope, value = _block(grad, x, weight, scale, column, width, out.dtype.element_ty, FORM)
        tl.store(out + column, ((slope - value * mean) * scale).to(out.dtype.element_ty), mask=column < width)


def forward(x: Tensor, weight: Tensor, eps: float, form: int, out: Tensor, rstd: Tensor) -> None:
    """Fill `out` [N, I] (contiguous) and `rstd` float32 [N], from x [N, I] with contiguous rows and weight [I]."""
    rows, width = x.shape
    if rows:
        _forward[(rows,)](x, weight, out, rstd, width, x.stride(0), eps, FORM=form, **_options(width))


def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: int, out: Tensor) -> None:
    """Fill `out`, the gradient of x [N, I]; it may be `grad` itself."""
    rows, width = x.shape
    if rows:
        strides = grad.stride(0), x.stride(0), out.stride(0)
        _backward[(rows,)](grad, x, weight, rstd, out, width, *strides, FORM=form, **_options(width))


def _options(width: int) -> dict[str, int]:
    """Blocks of a row, and warps of a program: eight values a thread."""
    block = min(triton.next_power_of_2(width), LARGEST_BLOCK)
    return {"BLOCK": block, "BLOCKS": triton.cdiv(width, block), "num_warps": min(16, max(1, block // 256))}
