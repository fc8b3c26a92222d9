"""The 16 levels of each 4-bit kind, in the order of their codes."""

from statistics import NormalDist

import torch
from torch import Tensor

OUTERMOST = 0.9677083  # probability of NF4's outermost level: the mean of 1 - 1/30 and 1 - 1/32
SUBNORMAL = 1 / 16  # code 1 of FP4, the subnormal of E2M1; before scaling


def nf4_levels() -> Tensor:
    """The 16 levels, float32, rising: 7 quantiles below zero, zero, 8 above, scaled so that the ends are -1 and 1."""
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in torch.linspace(OUTERMOST, 0.5, 9)[:-1].tolist()]
    below = [-quantile(p) for p in torch.linspace(OUTERMOST, 0.5, 8)[:-1].tolist()]
    return torch.tensor(sorted([*below, 0.0, *above])) / above[0]


def fp4_levels() -> Tensor:
    """The 16 levels, float32, by code: bit 3 is the sign, bits 2-1 the exponent (descending), bit 0 the mantissa."""
    magnitudes = [0.0, SUBNORMAL]
    magnitudes += [2.0 ** (4 - exponent) * (1 + mantissa / 2) for exponent in (1, 2, 3) for mantissa in (0, 1)]
    half = torch.tensor(magnitudes)
    return torch.cat([half, -half]) / max(magnitudes)


LEVELS = {"nf4": nf4_levels, "fp4": fp4_levels}
