"""Axes of a plot: the range of values, round ticks, and their labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora.runs.report.number_format import rate

TICKS, FEW_TICKS = 5, 3  # ticks that are easy to read; bar charts have less space on a phone


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks; `labels` has a text for each tick."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def fraction(self, value: float) -> float:
        """The position of `value` in the range: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def build_axis(
    values: Sequence[float], *, from_zero: bool = False, integers: bool = False, margin: float = 0.0, count: int = TICKS
) -> Axis:
    """An axis over all `values` (finite), widened by a share `margin` at ends that are not zero."""
    low, high = widen(
        min((*values, 0.0)) if from_zero else min(values), max((*values, 0.0)) if from_zero else max(values)
    )
    space = (high - low) * margin
    low, high = low - (0 if from_zero and low == 0 else space), high + space
    positions = ticks(low, high, count, integers)
    return Axis(low, high, positions, labels(positions))


def widen(low: float, high: float) -> tuple[float, float]:
    """The range itself, or a wider one around it where it is too narrow to divide."""
    width = max(abs(low), abs(high)) * 1e-6
    if high - low > width:
        return low, high
    space = max(abs(low), abs(high)) * 0.1 or 1.0
    return (0.0, high + space) if low == 0 else (low - space, high + space)


def ticks(low: float, high: float, count: int = TICKS, integers: bool = False) -> tuple[float, ...]:
    """About `count` multiples of 1, 2 or 5 times a power of ten in [low, high], evenly spaced.

    Needs low < high, as `widen` returns. With `integers` no step is smaller than 1.
    """
    rough = (high - low) / count
    exponent = math.floor(math.log10(rough))
    factor = next((factor for factor in (1, 2, 5) if factor * 10.0**exponent >= rough * (1 - 1e-9)), 10)
    if integers and exponent < 0:
        factor, exponent = 1, 0
    step = factor * 10.0**exponent
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    positions = (_multiple(index * factor, exponent) for index in range(first, last + 1))
    return tuple(min(max(position, low), high) for position in positions)


def labels(values: Sequence[float]) -> tuple[str, ...]:
    """Tick labels with the same number of decimals, so that they align; small ones as 2e-4, large ones as 1.5M."""
    largest = max((abs(value) for value in values), default=0.0)
    if 0 < largest < 0.01:
        return tuple(rate(value) for value in values)
    for unit, unit_size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if largest >= unit_size:
            scale = 1000.0 if unit == "k" else unit_size
            return tuple(
                f"{_fixed(value / scale, _decimals(values, scale))}{unit if value else ''}" for value in values
            )
    return tuple(_fixed(value, _decimals(values, 1.0)) for value in values)


def _multiple(factor: int, exponent: int) -> float:
    """Factor * 10**exponent, rounded once: 3 * 10**-1 is 0.3."""
    return factor / 10**-exponent if exponent < 0 else float(factor * 10**exponent)


def _decimals(values: Sequence[float], scale: float) -> int:
    """The number of decimals that writes each tick exactly."""
    return next(
        (n for n in range(9) if all(math.isclose(round(v / scale, n), v / scale, abs_tol=1e-12) for v in values)), 9
    )


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", "\u2212")
