"""Whatever becomes of the tensors of a released matrix: it is decoded, or refused in a line; nothing else is raised."""

import random
from collections.abc import Callable

import pytest
import torch
from support.released_formats import WRITERS, Files
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant.released.find_released import find_released
from qlora.quant.released.settings import QuantizationSettings

CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    *(lambda tensor, dtype=dtype: tensor.float().to(dtype) for dtype in (torch.uint8, torch.int8, torch.int32)),
    *(lambda tensor, dtype=dtype: tensor.float().to(dtype) for dtype in (torch.int64, torch.bfloat16)),
    lambda tensor: tensor.float().to(torch.float8_e4m3fn),
    lambda tensor: tensor.reshape(-1),
    lambda tensor: tensor.unsqueeze(0).repeat(3, *[1] * tensor.dim()),
    lambda tensor: tensor.reshape(-1)[:0],
    lambda tensor: tensor.reshape(-1)[0].clone(),
    lambda tensor: tensor.reshape(-1).contiguous().view(torch.uint8).random_(0, 256).view(tensor.dtype).view_as(tensor),
)


def decode_all(files: Files, quantization: dict[str, object]) -> None:
    for tensor in find_released(files, QuantizationSettings.parse({"quantization_config": quantization})).values():
        for index in range(tensor.stack or 1):
            parts = {role: files[key] for role, key in tensor.parts.items()}
            if tensor.stack is not None:
                parts = {role: part[index] if part.dim() else part for role, part in parts.items()}
            tensor.dequantize(parts, torch.bfloat16)


@pytest.mark.parametrize("writer", WRITERS)
def test_changed_tensors_are_decoded_or_refused(writer: str, seed: int) -> None:
    draw, (encode, quantization, _) = random.Random(seed), WRITERS[writer]
    torch.manual_seed(seed)
    written = {f"x.{name}": tensor for name, tensor in encode(torch.randn(96, 64)).items()}
    refused = 0
    for _ in range(60):
        tensors = dict(written)
        for key in draw.sample(sorted(tensors), draw.choice([1, 2])):
            tensors[key] = draw.choice(CHANGES)(tensors[key]).contiguous()
        if draw.random() < 0.1:
            del tensors[draw.choice(sorted(tensors))]
        try:
            decode_all(Files(tensors), quantization)
        except BaseModelError as error:
            assert len(str(error)) < 400 and "\n" not in str(error)
            refused += 1
    assert refused
