"""NF4, 4-bit NormalFloat: 16 levels at the quantiles of a normal distribution. QLoRA section 3, arXiv:2305.14314."""

from dataclasses import dataclass
from typing import ClassVar

from qlora.quant.fourbit import FourBit


@dataclass(frozen=True)
class Nf4(FourBit):
    """Levels that divide a normal distribution into equal mass. Error per weight <= 0.152 absmax."""

    kind: ClassVar[str] = "nf4"
