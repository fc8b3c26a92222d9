"""Dequantization in one Triton kernel: W from codes, levels and double-quantized absmax, no absmax tensor in between.

The arithmetic is that of bitsandbytes, each step rounded separately, so that both give the same bits.
Triton is imported here and by the kernels of qlora/model/kernels, one file for each kernel.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from qlora.quant.block_sizes import NESTED_BLOCK

PROGRAM_BYTES = 1024  # code bytes, two weights each, that one program dequantizes


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    codes, absmax, nested_absmax, offset, absmax_levels, levels, out,
    weights, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Out[i] = levels[code i] * absmax[i // BLOCK]; the high nibble of a byte comes first."""
    position = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    mask = position * 2 < weights
    byte = tl.load(codes + position, mask=mask, other=0).to(tl.int32)
    block = position * 2 // BLOCK
    scale = tl.load(absmax + block, mask=mask, other=0)
    if DOUBLE:
        restored = tl.load(absmax_levels + scale.to(tl.int32), mask=mask, other=0.0)
        restored = restored * tl.load(nested_absmax + block // NESTED, mask=mask, other=0.0)
        scale = restored + tl.load(offset)
    first = tl.load(levels + (byte >> 4)) * scale
    second = tl.load(levels + (byte & 15)) * scale
    index = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + index, tl.interleave(first, second).to(out.dtype.element_ty), mask=index < weights)


def dequantize(stored: Sequence[Tensor], block: int, levels: Tensor, absmax_levels: Tensor, out: Tensor) -> Tensor:
    """Fill and return `out` [O, I], from codes, absmax and, with double quantization, nested absmax and offset.

    levels [16] and absmax_levels [256] are float32, on the device of the other tensors.
    """
    codes, absmax, *nested = stored
    nested_absmax, offset = nested[:2] if nested else (absmax, absmax)
    programs = (triton.cdiv(codes.numel(), PROGRAM_BYTES),)
    _dequantize[programs](
        codes, absmax, nested_absmax, offset, absmax_levels, levels, out, out.numel(),
        BLOCK=block, NESTED=NESTED_BLOCK, DOUBLE=bool(nested), BYTES=PROGRAM_BYTES, enable_fp_fusion=False,
    )  # fmt: skip
    return out
