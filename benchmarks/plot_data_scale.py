"""docs/data_scale.svg: time and memory of data preparation by the number of records, from results/data_scale.json."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora.runs.report.axis import Axis, build_axis
from qlora.runs.report.markup import Markup, tag

PLOT = Path(__file__).parents[1] / "docs" / "data_scale.svg"
OURS, TRL = "ours, 2 processes", "TRL, 2 processes"
MIB = 2**20
WIDTH, HEIGHT, PANEL, LEFT, TOP, BOTTOM = 760, 300, 300, 62, 64, 46
STYLE = (  # CSS
    "text{font:13px system-ui,sans-serif;fill:#1d2126}.quiet{fill:#626a73;font-size:12px}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.big{font-size:15px;font-weight:600}.line{fill:none;stroke-width:2}"
    ".ours{stroke:#0072b2;color:#0072b2}.trl{stroke:#d55e00;color:#d55e00}.dot{fill:currentColor;stroke:none}"
    ".rule{stroke:#e3e6e9}svg{background:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e2e5e8}.quiet{fill:#98a1aa}.ours{stroke:#6db9ec;color:#6db9ec}"
    ".trl{stroke:#f0a35e;color:#f0a35e}.rule{stroke:#2b3036}svg{background:#15181b}}"
)
Curve = list[tuple[float, float]]
Read = Callable[[Mapping[str, Any]], float]


def draw_file(path: Path) -> None:
    """Draw the plot of a results file."""
    PLOT.write_text(draw(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


def draw(result: Mapping[str, Any]) -> str:
    """The SVG: processor time on the left, memory on the right."""
    title = "Preparing short conversations with two worker processes"
    parts = [tag("style", Markup(STYLE)), tag("text", title, x=8, y=22, class_="big")]
    parts += [*_legend("ours", "qlora", 430), *_legend("trl", "TRL", 510)]
    parts += _panel(result, 0, "processor time, seconds", lambda values: float(values["cpu_seconds"]))
    parts += _panel(result, WIDTH // 2, "memory above the imports, MiB", memory_mib)
    size = {"width": WIDTH, "height": HEIGHT, "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    return str(tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=title, **size)) + "\n"


def memory_mib(values: Mapping[str, Any]) -> float:
    """Memory of the process and of two workers as large as the largest one, above what they share."""
    return float(values["peak_bytes"] + 2 * values["worker_peak_bytes"]) / MIB


def _curve(result: Mapping[str, Any], name: str, read: Read) -> Curve:
    return [(int(rows) / 1000, read(values[name])) for rows, values in result["sizes"].items() if name in values]


def _panel(result: Mapping[str, Any], left: int, title: str, read: Read) -> list[Markup]:
    curves = {"ours": _curve(result, OURS, read), "trl": _curve(result, TRL, read)}
    points = [point for curve in curves.values() for point in curve]
    x = build_axis([rows for rows, _ in points], from_zero=True, integers=True)
    y = build_axis([value for _, value in points], from_zero=True, margin=0.05)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return left + LEFT + x.fraction(point[0]) * PANEL, HEIGHT - BOTTOM - y.fraction(point[1]) * _height()

    parts = [tag("text", title, x=left + 8, y=TOP - 14, class_="quiet"), *_gridlines(x, y, left)]
    for style, curve in curves.items():
        places = [at(point) for point in curve]
        if places:
            path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
            parts.append(tag("path", d=path, class_=f"line {style}"))
        parts += [tag("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=3.5, class_=f"dot {style}") for px, py in places]
    return parts


def _height() -> int:
    return HEIGHT - TOP - BOTTOM


def _gridlines(x: Axis, y: Axis, left: int) -> list[Markup]:
    start, end, parts = left + LEFT, left + LEFT + PANEL, list[Markup]()
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = HEIGHT - BOTTOM - y.fraction(tick) * _height()
        parts.append(tag("line", x1=start, x2=end, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="rule"))
        parts.append(tag("text", label, x=start - 8, y=f"{at + 4:.1f}", class_="quiet end"))
    for tick, label in zip(x.ticks, x.labels, strict=True):
        at = start + x.fraction(tick) * PANEL
        parts.append(tag("text", label, x=f"{at:.1f}", y=HEIGHT - BOTTOM + 20, class_="quiet middle"))
    parts.append(tag("text", "thousand records", x=end, y=HEIGHT - 8, class_="quiet end"))
    return parts


def _legend(style: str, name: str, left: int) -> list[Markup]:
    return [
        tag("path", d=f"M{left} 18h24", class_=f"line {style}"),
        tag("text", name, x=left + 30, y=22),
    ]
