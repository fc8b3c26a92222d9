"""The arithmetic of blockwise.py on bitsandbytes' registered operators; the only module that calls them.

Dequantization is one operator of this package, so that torch.compile, FakeTensor and meta tensors see one opaque call.
"""

from collections.abc import Sequence

import bitsandbytes  # noqa: F401 - importing it registers torch.ops.bitsandbytes
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from qlora.quant import cpu_quantize
from qlora.quant.block_sizes import NESTED_BLOCK
from qlora.quant.cuda_dequantize import Spec, fastest

LARGEST_CPU_BLOCK = 1024  # larger ones take a slow path of bitsandbytes on a CPU

_absmax_levels: dict[torch.device, Tensor] = {}


def quantize(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(O*I/2)], high nibble first, and absmax float32 [N] of a float32, bfloat16 or float16 weight."""
    if weight.device.type == "cpu":
        return cpu_quantize.quantize(weight, kind, block)
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight.contiguous(), block, kind, torch.uint8)
    return codes.reshape(-1), absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: absmax float32 [N] -> codes uint8 [N], nested absmax float32 [ceil(N/256)], offset [1]."""
    offset = absmax.mean()
    levels = absmax_levels(absmax.device)
    codes, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise.default(absmax - offset, levels, NESTED_BLOCK)
    return codes, nested_absmax, offset.reshape(1)


def absmax_levels(device: torch.device) -> Tensor:
    """The 256 levels of the dynamic 8-bit type, float32, one tensor per device."""
    if device not in _absmax_levels:
        _absmax_levels[device] = create_dynamic_map().to(device)
    return _absmax_levels[device]


def restore_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor, levels: Tensor | None = None) -> Tensor:
    """Undo quantize_absmax: float32 [N]; `levels`: those of the checkpoint, if it has any."""
    levels = absmax_levels(codes.device) if levels is None else levels
    return _dequantize_blockwise(codes, nested_absmax, levels, NESTED_BLOCK, torch.float32) + offset


def _dequantize_blockwise(codes: Tensor, absmax: Tensor, levels: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    restored: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, levels, block, dtype)
    return restored


torch.library.define(
    "qlora::dequantize_4bit",
    "(Tensor[] stored, int block, str kind, int[] shape, ScalarType dtype, Tensor? after) -> Tensor",
)


def _shape_only(
    stored: Sequence[Tensor], block: int, kind: str, shape: Sequence[int], dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=stored[0].device)


def dequantize(
    stored: Sequence[Tensor], block: int, kind: str, shape: Sequence[int], dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    """W [O, I] in `dtype`: levels[code] * absmax in float32, rounded once.

    stored: codes, absmax; with double quantization also nested absmax, offset, and the absmax levels of the checkpoint,
    if it has any. `after` only orders the call, see FrozenLinear.weight.
    """
    spec = Spec(kind, block, dtype)
    kernel = fastest(stored, spec, dequantize_unfused) if stored[0].is_cuda else dequantize_unfused
    return kernel(stored, shape, spec)


def dequantize_unfused(stored: Sequence[Tensor], shape: Sequence[int], spec: Spec) -> Tensor:
    """W [O, I] by bitsandbytes' own kernels: absmax first, then the weights."""
    codes, absmax, *nested = stored
    if nested:
        absmax = restore_absmax(absmax, *nested)
    kernel = _dequantize_on_cpu if codes.device.type == "cpu" else _dequantize_4bit
    return kernel(codes, absmax, spec.block, spec.kind, shape, spec.dtype)


torch.library.register_fake("qlora::dequantize_4bit", _shape_only)
torch.library.impl("qlora::dequantize_4bit", ("cpu", "cuda", "xpu", "mps"), dequantize)


def _dequantize_on_cpu(
    codes: Tensor, absmax: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Correct values without bitsandbytes' CPU fallbacks, which run a compiler.

    Its AVX512 kernel (0.50.2) is wrong where a block crosses the end of a row, so the matrix is passed as one long row.
    """
    if block > LARGEST_CPU_BLOCK:  # a large block is several smaller ones with the same absmax
        absmax, block = absmax.repeat_interleave(block // LARGEST_CPU_BLOCK), LARGEST_CPU_BLOCK
    out_features, in_features = shape
    if in_features % block == 0:
        return _dequantize_4bit(codes, absmax, block, kind, shape, dtype)
    row = _dequantize_4bit(codes, absmax, block, kind, (1, 2 * codes.numel()), dtype)
    return row[0, : out_features * in_features].reshape(out_features, in_features)


def _dequantize_4bit(
    codes: Tensor, absmax: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, block, kind, shape, dtype)
    return weight
