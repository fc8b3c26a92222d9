"""The fused dequantization kernel, run by Triton's interpreter on the CPU, gives bitsandbytes' bits."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

SCRIPT = """
import torch
from qlora.quant import triton_kernel
from qlora.quant.bitsandbytes_ops import dequantize_unfused
from qlora.quant.blockwise import dynamic_levels
from qlora.quant.cuda_dequantize import Spec, dequantize_fused, random_matrix
from qlora.quant.levels import LEVELS
for kind, levels in LEVELS.items():
    for shape, block in (((8, 64), 64), ((5, 7), 32), ((3, 4096), 128), ((33, 129), 64)):
        for dtype in (torch.float32, torch.float16):  # the interpreter truncates bfloat16, a GPU rounds it
            double = random_matrix(shape, block, torch.device("cpu"))
            single = [double[0], torch.rand(len(double[1]))]
            for stored in (double, double[:4], single):
                out = torch.empty(shape, dtype=dtype)
                triton_kernel.dequantize(stored[:4], block, levels(), dynamic_levels(), out)
                spec = Spec(kind, block, dtype)
                expected = dequantize_unfused(stored, shape, spec)
                assert torch.equal(out, expected), (kind, shape, dtype)
                assert torch.equal(dequantize_fused(stored, shape, spec), expected), (kind, shape, dtype)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with torch for CUDA)")
def test_the_fused_kernel_is_bitsandbytes_bit_for_bit() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert process.stdout == "equal\n", process.stderr
