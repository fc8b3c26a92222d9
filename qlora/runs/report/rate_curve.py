"""The curve of `qlora sweep --find-lr`: held-out loss over the learning rate, on a logarithmic axis."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.runs.report import number_format
from qlora.runs.report.axis import Axis, build_axis
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.series import finite
from qlora.runs.report.svg import Curve, plot

STYLES = {"range": "raw", "refinement": "smooth"}  # of a short run, and of a run at its length
ABOVE = 2.0  # times the range of losses below the median, above which a diverged run is left out of the plot


def rate_figure(search: Mapping[str, Any]) -> Markup | None:
    """The figure of a search's `curve` and `reason`; None without a finite loss."""
    measured = [point for point in search["curve"] if finite(point["eval_loss"])]
    if not measured:
        return None
    losses = sorted(point["eval_loss"] for point in measured)
    highest = losses[0] + ABOVE * max(losses[len(losses) // 2] - losses[0], 0.05 * abs(losses[0]))
    shown = [point for point in measured if point["eval_loss"] <= highest]
    curves = [_curve(stage, [p for p in shown if p["stage"] == stage], i) for i, stage in enumerate(STYLES)]
    x, y = _rate_axis([p["rate"] for p in measured]), build_axis([p["eval_loss"] for p in shown], margin=0.06)
    drawing = plot(x, y, curves, ("learning rate", "held-out loss"), "held-out loss by learning rate")
    left_out = len(search["curve"]) - len(shown)
    note = search["reason"] + (f" {left_out} rates are above the plot or diverged." if left_out else "")
    caption = tag("figcaption", tag("h3", "Learning rate"), _legend(measured))
    return tag("figure", caption, drawing, tag("p", note, class_="note"), class_="wide")


def _curve(stage: str, points: Sequence[Mapping[str, Any]], color: int) -> Curve:
    ordered = sorted(points, key=lambda point: float(point["rate"]))
    tooltips = [f"rate {p['rate']:g}: held-out loss {p['eval_loss']:.4f} after {p['steps']:,} steps" for p in ordered]
    return Curve([(math.log10(p["rate"]), p["eval_loss"]) for p in ordered], STYLES[stage], color, tooltips)


def _rate_axis(rates: Sequence[float]) -> Axis:
    """A logarithmic axis with a tick at each power of ten."""
    low, high = math.log10(min(rates)) - 0.1, math.log10(max(rates)) + 0.1
    decades = range(math.ceil(low), math.floor(high) + 1)
    ticks = tuple(float(decade) for decade in decades) or ((low + high) / 2,)
    return Axis(low, high, ticks, tuple(number_format.rate(10.0**tick) for tick in ticks))


def _legend(points: Sequence[Mapping[str, Any]]) -> Markup:
    steps = {point["stage"]: point["steps"] for point in points}
    entries = []
    for color, (stage, style) in enumerate(STYLES.items()):
        if stage in steps:
            sample = tag("svg", tag("path", d="M0 6H18", class_=f"{style} c{color}"), class_="key", aria_hidden="true")
            entries.append(tag("span", sample, f" {stage}, {steps[stage]:,} steps", class_="entry"))
    return tag("p", *entries, class_="legend plain")
