"""Dequantization on a CUDA GPU: the fused Triton kernel where it gives the same bits in less time, else bitsandbytes.

Both are compared and timed once for each device, kind, block and type, on random weights.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.errors import first_line
from qlora.quant.block_sizes import NESTED_BLOCK
from qlora.quant.blockwise import dynamic_levels
from qlora.quant.levels import LEVELS
from qlora.utils.kernel_notes import note_kernel

PROBE_SHAPE = (14336, 4096)  # of the random matrix that both kernels dequantize: long enough to hide launches
RUNS = 20  # of each kernel, after as many to warm up


class Spec(NamedTuple):
    """How a matrix is stored, and the type that it is dequantized to."""

    kind: str
    block: int
    dtype: torch.dtype


Dequantize = Callable[[Sequence[Tensor], Sequence[int], Spec], Tensor]  # (stored, shape [O, I], spec) -> W


def fastest(stored: Sequence[Tensor], spec: Spec, reference: Dequantize) -> Dequantize:
    """The fused kernel if it gives the bits of `reference` in less time, else `reference`."""
    return dequantize_fused if _fused_is_better(stored[0].device, len(stored), spec, reference) else reference


def dequantize_fused(stored: Sequence[Tensor], shape: Sequence[int], spec: Spec) -> Tensor:
    """W [O, I] by the Triton kernel."""
    from qlora.quant import triton_kernel  # Triton is not installed everywhere

    out = torch.empty(*shape, dtype=spec.dtype, device=stored[0].device)
    absmax_levels = stored[4] if len(stored) > 4 else _levels_on("absmax", out.device)
    triton_kernel.dequantize(stored[:4], spec.block, _levels_on(spec.kind, out.device), absmax_levels, out)
    return out


@cache
def _fused_is_better(device: torch.device, tensors: int, spec: Spec, reference: Dequantize) -> bool:
    if find_spec("triton") is None:
        return False
    stored = random_matrix(PROBE_SHAPE, spec.block, device, tensors)
    try:
        fused = dequantize_fused(stored, PROBE_SHAPE, spec)
    except Exception as error:  # Triton compiles at its first call, which takes a C compiler
        note_kernel(f"bitsandbytes dequantizes, since the fused kernel does not run here ({first_line(error)})")
        return False
    if not torch.equal(fused, reference(stored, PROBE_SHAPE, spec)):
        note_kernel("bitsandbytes dequantizes, since the fused kernel gives other bits here")
        return False
    return _seconds(dequantize_fused, stored, spec) < _seconds(reference, stored, spec)


def random_matrix(shape: tuple[int, int], block: int, device: torch.device, tensors: int = 5) -> list[Tensor]:
    """Random stored tensors of a matrix [O, I].

    Two: codes and float32 absmax. With double quantization four or five: codes, absmax codes, nested absmax, offset,
    absmax levels.
    """
    generator = torch.Generator().manual_seed(0)
    weights = shape[0] * shape[1]
    blocks = -(-weights // block)
    codes = torch.randint(256, (-(-weights // 2),), dtype=torch.uint8, generator=generator)
    if tensors == 2:
        return [codes.to(device), torch.rand(blocks, generator=generator).to(device)]
    stored = [
        codes,
        torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator),
        torch.rand(-(-blocks // NESTED_BLOCK), generator=generator),
        torch.rand(1, generator=generator),
        dynamic_levels(),
    ]
    return [tensor.to(device) for tensor in stored[:tensors]]


def _seconds(dequantize: Dequantize, stored: Sequence[Tensor], spec: Spec) -> float:
    """GPU time of RUNS calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(RUNS):
        dequantize(stored, PROBE_SHAPE, spec)
    start.record()
    for _ in range(RUNS):
        dequantize(stored, PROBE_SHAPE, spec)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@cache
def _levels_on(kind: str, device: torch.device) -> Tensor:
    levels = dynamic_levels() if kind == "absmax" else LEVELS[kind]()
    return levels.to(device)
