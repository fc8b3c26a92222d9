"""The fused dequantization kernel in Triton's interpreter: bitsandbytes' bits. model/test_kernels.py runs this file."""

import pytest
import torch

from qlora.quant import triton_kernel
from qlora.quant.bitsandbytes_ops import dequantize_unfused
from qlora.quant.blockwise import dynamic_levels
from qlora.quant.cuda_dequantize import Spec, dequantize_fused, random_matrix
from qlora.quant.levels import LEVELS

SHAPES = [((8, 64), 64), ((5, 7), 32), ((3, 4096), 128), ((33, 129), 64)]


@pytest.mark.sample(of=6, every=("kind", "dtype"))
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates bfloat16, a GPU rounds it
def test_the_fused_kernel_is_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], block: int, kind: str, dtype: torch.dtype
) -> None:
    double = random_matrix(shape, block, torch.device("cpu"))
    single = [double[0], torch.rand(len(double[1]))]
    for stored in (double, double[:4], single):
        out = torch.empty(shape, dtype=dtype)
        triton_kernel.dequantize(stored[:4], block, LEVELS[kind](), dynamic_levels(), out)
        spec = Spec(kind, block, dtype)
        expected = dequantize_unfused(stored, shape, spec)
        assert torch.equal(out, expected)
        assert torch.equal(dequantize_fused(stored, shape, spec), expected)
