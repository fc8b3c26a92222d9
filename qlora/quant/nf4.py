"""NF4, 4-bit NormalFloat: 16 levels at the quantiles of a normal distribution. QLoRA section 3, arXiv:2305.14314."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from qlora.quant.fourbit import FourBit

OUTERMOST = 0.9677083  # probability of the outermost level: the mean of 1 - 1/30 and 1 - 1/32


def levels() -> Tensor:
    """The 16 levels, float32, rising: 7 quantiles below zero, zero, 8 above, scaled so that the ends are -1 and 1."""
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in torch.linspace(OUTERMOST, 0.5, 9)[:-1].tolist()]
    below = [-quantile(p) for p in torch.linspace(OUTERMOST, 0.5, 8)[:-1].tolist()]
    return torch.tensor(sorted([*below, 0.0, *above])) / above[0]


@dataclass(frozen=True)
class Nf4(FourBit):
    """Levels where a normal distribution has equal mass between them. Error per weight <= 0.152 absmax."""

    kind: ClassVar[str] = "nf4"
