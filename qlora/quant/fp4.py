"""FP4, a 4-bit float: sign, two bits of exponent, one of mantissa, as bitsandbytes orders its codes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora.quant.fourbit import FourBit

SMALLEST = 1 / 16  # code 1, where E2M1 has its subnormal; before scaling


def levels() -> Tensor:
    """The 16 levels, float32, by code: bit 3 is the sign, bits 2-1 the exponent (counting down), bit 0 the mantissa."""
    magnitudes = [0.0, SMALLEST]
    magnitudes += [2.0 ** (4 - exponent) * (1 + mantissa / 2) for exponent in (1, 2, 3) for mantissa in (0, 1)]
    half = torch.tensor(magnitudes)
    return torch.cat([half, -half]) / max(magnitudes)


@dataclass(frozen=True)
class Fp4(FourBit):
    """Levels of a 4-bit float. Error per weight <= 0.167 absmax."""

    kind: ClassVar[str] = "fp4"
