"""Axes: where a value lies between two ends, and which round values get a tick."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora.runs.report.number_format import rate

ABOUT, FEW = 5, 3  # ticks a reader takes in at a glance; beside names and values there is less room on a phone


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks; `labels` has a text for each tick."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def place(self, value: float) -> float:
        """Where `value` lies, as a share of the range: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def axis(
    values: Sequence[float], *, from_zero: bool = False, whole: bool = False, margin: float = 0.0, about: int = ABOUT
) -> Axis:
    """An axis that holds all of `values` (finite), widened by a share `margin` at ends that are not zero."""
    low, high = widened(
        min((*values, 0.0)) if from_zero else min(values), max((*values, 0.0)) if from_zero else max(values)
    )
    room = (high - low) * margin
    low, high = low - (0 if from_zero and low == 0 else room), high + room
    places = ticks(low, high, about, whole)
    return Axis(low, high, places, labels(places))


def widened(low: float, high: float) -> tuple[float, float]:
    """The range itself, or, where it is too narrow to divide, one around it."""
    width = max(abs(low), abs(high)) * 1e-6
    if high - low > width:
        return low, high
    room = max(abs(low), abs(high)) * 0.1 or 1.0
    return (0.0, high + room) if low == 0 else (low - room, high + room)


def ticks(low: float, high: float, about: int = ABOUT, whole: bool = False) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], evenly spaced, `about` as many as asked for.

    Needs low < high, as `widened` gives. With `whole` no step is smaller than 1.
    """
    rough = (high - low) / about
    exponent = math.floor(math.log10(rough))
    factor = next((factor for factor in (1, 2, 5) if factor * 10.0**exponent >= rough * (1 - 1e-9)), 10)
    if whole and exponent < 0:
        factor, exponent = 1, 0
    step = factor * 10.0**exponent
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = (_multiple(index * factor, exponent) for index in range(first, last + 1))
    return tuple(min(max(place, low), high) for place in places)


def labels(places: Sequence[float]) -> tuple[str, ...]:
    """Tick labels with the same number of decimals, so that they align; small ones as 2e-4, large ones as 1.5M."""
    largest = max((abs(place) for place in places), default=0.0)
    if 0 < largest < 0.01:
        return tuple(rate(place) for place in places)
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if largest >= one:
            scale = 1000.0 if unit == "k" else one
            return tuple(
                f"{_fixed(place / scale, _decimals(places, scale))}{unit if place else ''}" for place in places
            )
    return tuple(_fixed(place, _decimals(places, 1.0)) for place in places)


def _multiple(factor: int, exponent: int) -> float:
    """Factor * 10**exponent, rounded once: 3 * 10**-1 is 0.3."""
    return factor / 10**-exponent if exponent < 0 else float(factor * 10**exponent)


def _decimals(places: Sequence[float], scale: float) -> int:
    """The decimals that tell the ticks apart and write each exactly."""
    return next(
        (n for n in range(9) if all(math.isclose(round(p / scale, n), p / scale, abs_tol=1e-12) for p in places)), 9
    )


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", "\u2212")
