"""Metrics as curves: finite points in order of step, smoothed without lag, downsampled without losing a peak."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

Point = tuple[float, float]  # (step, value)
MAX_POINTS = 800  # more than a screen can show of one curve; keeps the page of a long run small
_WINDOW_SHARE = 1 / 40  # half the smoothing window, as a share of all points


def points(metrics: Iterable[Mapping[str, Any]], event: str, key: str) -> list[Point]:
    """The (step, value) of each line of `event` with a finite `key`; of a step logged twice, the later line."""
    lines = (line for line in metrics if line.get("event") == event)
    values = {line["step"]: line[key] for line in lines if finite(line.get("step")) and finite(line.get(key))}
    return sorted((float(step), float(value)) for step, value in values.items())


def finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def half_window(count: int) -> int:
    """How many neighbors on each side a curve of `count` points is smoothed over; 0 for a short one."""
    return min(100, math.ceil(count * _WINDOW_SHARE)) if count >= 12 else 0


def smoothed(curve: Sequence[Point]) -> list[Point]:
    """Each point as the mean of its neighbors, the same number on both sides: straight lines stay, nothing lags."""
    sums = [0.0, *accumulate(value for _, value in curve)]
    last, half = len(curve) - 1, half_window(len(curve))
    widths = [min(index, last - index, half) for index in range(len(curve))]
    return [
        (curve[index][0], (sums[index + width + 1] - sums[index - width]) / (2 * width + 1))
        for index, width in enumerate(widths)
    ]


def downsampled(curve: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """About `limit` of the points: the first, the last, and the lowest and highest of each interval between them."""
    if len(curve) <= limit:
        return list(curve)
    interval = math.ceil(2 * len(curve) / (limit - 2))
    kept = {curve[0], curve[-1]}
    for start in range(0, len(curve), interval):
        group = curve[start : start + interval]
        kept |= {min(group, key=_value), max(group, key=_value)}
    return sorted(kept)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which about `share` of `values` are."""
    return sorted(values)[round((len(values) - 1) * share)]


def _value(point: Point) -> float:
    return point[1]
