"""Metrics as curves: finite points in order of step, smoothed without lag, thinned without losing a peak."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

Point = tuple[float, float]  # (step, value)
MOST_POINTS = 800  # more than a screen can show of one curve; keeps a page of a long run small
_SMOOTHED_SHARE = 1 / 40  # half the window, of all points


def points(metrics: Iterable[Mapping[str, Any]], event: str, key: str) -> list[Point]:
    """The (step, value) of each line of `event` that has a finite `key`; of a step logged twice, the later line."""
    lines = (line for line in metrics if line.get("event") == event)
    found = {line["step"]: line[key] for line in lines if finite(line.get("step")) and finite(line.get(key))}
    return sorted((float(step), float(value)) for step, value in found.items())


def finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def half_window(count: int) -> int:
    """How many neighbours on each side a curve of `count` points is smoothed over; 0 for a short one."""
    return min(100, math.ceil(count * _SMOOTHED_SHARE)) if count >= 12 else 0


def smoothed(curve: Sequence[Point]) -> list[Point]:
    """Each point as the mean of its neighbours, as many on either side: straight lines stay, nothing lags."""
    sums = [0.0, *accumulate(value for _, value in curve)]
    last, half = len(curve) - 1, half_window(len(curve))
    reach = [min(index, last - index, half) for index in range(len(curve))]
    return [
        (curve[index][0], (sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
        for index, near in enumerate(reach)
    ]


def thinned(curve: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` of the points: first, last, and the lowest and highest of each stretch in between."""
    if len(curve) <= most:
        return list(curve)
    stretch = math.ceil(2 * len(curve) / (most - 2))
    kept = {curve[0], curve[-1]}
    for start in range(0, len(curve), stretch):
        part = curve[start : start + stretch]
        kept |= {min(part, key=_value), max(part, key=_value)}
    return sorted(kept)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which about `share` of `values` lie."""
    return sorted(values)[round((len(values) - 1) * share)]


def _value(point: Point) -> float:
    return point[1]
