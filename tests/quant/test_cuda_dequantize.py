"""The probe of the GPU's dequantization kernels: its random matrices have the form of quantized ones."""

import pytest
import torch

from qlora.quant import Quant, build_quantizer
from qlora.quant.cuda_dequantize import random_matrix

CPU = torch.device("cpu")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 256])
def test_a_random_matrix_has_the_stored_tensors_of_a_quantized_one(double: bool, block: int) -> None:
    shape = (128, 192)
    layer = build_quantizer(Quant(double=double, block=block)).quantize(torch.randn(shape))
    stored = list(layer.stored().values())
    matrix = random_matrix(shape, block, CPU, len(stored))
    assert [(tensor.dtype, tensor.numel()) for tensor in matrix] == [(t.dtype, t.numel()) for t in stored]
