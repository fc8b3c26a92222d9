"""Plots as inline SVG that fit any width without scaling their text.

The drawing area is the content box of the <svg>, its padding holds the tick labels: positions are percentages of that
box, text and dots keep their size, and only the curves, in a nested <svg> of 1000 x 1000 units, are stretched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora.runs.report.axis import Axis
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.series import Point

UNITS = 1000  # width and height of the stretched square of the curves
ROW = 26  # pixels from one bar to the next
_BAR = 12


@dataclass(frozen=True)
class Curve:
    """Points to join; `style` is a CSS class (raw, smooth, held-out), `color` the number of the run."""

    points: Sequence[Point]
    style: str
    color: int = 0
    dots: Sequence[str] = ()  # a tooltip for each point, which is then drawn as a dot


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: from `start` to `end`, the name on the left, the value on the right."""

    name: str
    value: str
    start: float
    end: float
    color: int = 0


@dataclass(frozen=True)
class Mark:
    """A vertical line across all rows of a bar chart."""

    name: str
    at: float


def plot(x: Axis, y: Axis, curves: Sequence[Curve], titles: tuple[str, str], summary: str) -> Markup:
    """Curves over two axes; `titles` name the axes and their units, `summary` is for screen readers."""
    paths = [_path(curve, x, y) for curve in curves if len(curve.points) > 1]
    inner = tag(
        "svg", *paths, class_="curves", viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none",
        width="100%", height="100%",
    )  # fmt: skip
    dots = [dot for curve in curves for dot in _dots(curve, x, y)]
    return tag("svg", _y_axis(y), _x_axis(x, titles[0]), _y_title(titles[1]), inner, *dots, **_image("plot", summary))


def bar_chart(x: Axis, rows: Sequence[Bar], marks: Sequence[Mark], title: str, summary: str) -> Markup:
    """Horizontal bars, one per row, and vertical marks; `title` names the axis and its unit."""
    height = ROW * len(rows)
    bars = [element for index, row in enumerate(rows) for element in _bar(row, x, (index + 0.5) / len(rows))]
    lines = [element for mark in marks for element in _mark(mark, x)]
    image = _image("bars marked" if marks else "bars", summary)
    return tag("svg", _x_axis(x, title), *bars, *lines, style=f"height:{height}px", **image)


def _image(kind: str, summary: str) -> dict[str, object]:
    return {"class_": f"figure {kind}", "role": "img", "aria-label": summary}


def _y_axis(y: Axis) -> Markup:
    """A grid line and a label for each tick of the vertical axis."""
    elements = []
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = _percent(1 - y.fraction(tick))
        elements.append(tag("line", x1="0", x2="100%", y1=at, y2=at, class_="ruler"))
        elements.append(tag("text", label, x="0", y=at, dx="-8", dy=".32em", class_="tick end"))
    return tag("g", *elements)


def _x_axis(x: Axis, title: str) -> Markup:
    """The horizontal axis: a line, a mark and a label for each tick, and the title."""
    elements = [tag("line", x1="0", x2="100%", y1="100%", y2="100%", class_="base")]
    for tick, label in zip(x.ticks, x.labels, strict=True):
        at = _percent(x.fraction(tick))
        foot = tag("svg", tag("line", y2="4", class_="base"), x=at, y="100%", class_="foot")
        elements += [foot, tag("text", label, x=at, y="100%", dy="1.55em", class_="tick middle")]
    elements.append(tag("text", title, x="100%", y="100%", dy="2.9em", class_="unit end"))
    return tag("g", *elements)


def _y_title(title: str) -> Markup:
    """The title of the vertical axis, written horizontally above it."""
    return tag("text", title, x="0", y="0", dx="-44", dy="-1em", class_="unit")


def _path(curve: Curve, x: Axis, y: Axis) -> Markup:
    positions = (
        f"{x.fraction(step) * UNITS:.1f} {(1 - y.fraction(value)) * UNITS:.1f}" for step, value in curve.points
    )
    return tag("path", d="M" + "L".join(positions), class_=f"{curve.style} c{curve.color}")


def _dots(curve: Curve, x: Axis, y: Axis) -> list[Markup]:
    labeled = zip(curve.points, curve.dots, strict=False)
    return [
        tag("circle", tag("title", label), cx=_percent(x.fraction(step)), cy=_percent(1 - y.fraction(value)), r="3.2",
            class_=f"dot {curve.style} c{curve.color}")
        for (step, value), label in labeled
    ]  # fmt: skip


def _bar(row: Bar, x: Axis, middle: float) -> tuple[Markup, Markup, Markup]:
    start, end, at = x.fraction(row.start), x.fraction(row.end), _percent(middle)
    shape = tag(
        "rect", tag("title", f"{row.name}: {row.value}"),
        x=_percent(start), y=at, width=_percent(end - start), height=_BAR,
        transform=f"translate(0 {-_BAR / 2:g})", class_=f"bar c{row.color}",
    )  # fmt: skip
    name = tag("text", _short(row.name), x="0", y=at, dx="-10", dy=".35em", class_="name end")
    return name, shape, tag("text", row.value, x="100%", y=at, dx="74", dy=".35em", class_="value end")


def _mark(mark: Mark, x: Axis) -> tuple[Markup, Markup]:
    at, side = x.fraction(mark.at), "end" if x.fraction(mark.at) > 0.5 else "start"
    line = tag("line", x1=_percent(at), x2=_percent(at), y1="0", y2="100%", class_="mark")
    return line, tag("text", mark.name, x=_percent(at), y="0", dy="-.6em", class_=f"mark {side}")


def _percent(share: float) -> str:
    return f"{share * 100:.3f}%"


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "\u2026"
