"""FP4, a 4-bit float: sign, two bits of exponent, one of mantissa, as bitsandbytes orders its codes."""

from dataclasses import dataclass
from typing import ClassVar

from qlora.quant.fourbit import FourBit


@dataclass(frozen=True)
class Fp4(FourBit):
    """Levels of a 4-bit float. Error per weight <= 0.167 absmax."""

    kind: ClassVar[str] = "fp4"
