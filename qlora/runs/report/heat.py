"""The spectrum of an adapter as one SVG file: a row a layer, a cell a direction, darker where more of the energy is."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora.runs.report.markup import Markup, tag

CELL, ROW, TOP, RIGHT = 18, 18, 64, 24  # pixels
LETTER = 6.6  # width of one letter of the labels
WIDEST = 720  # pixels of cells: high ranks get narrower ones
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1d2126}.quiet{fill:#626a73}.end{text-anchor:end}"
    ".cell{fill:#0072b2}.held{stroke:#b84d00;stroke-width:2}svg{background:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e2e5e8}.quiet{fill:#98a1aa}.cell{fill:#6db9ec}"
    ".held{stroke:#f0a35e}svg{background:#15181b}}"
)


@dataclass(frozen=True)
class Layer:
    """One row: the layer's name, its singular values, and after how many of them 90 % of the energy is held."""

    name: str
    values: Sequence[float]
    held: int


def heat_page(title: str, layers: Sequence[Layer], verdict: str) -> str:
    """The picture as a whole SVG document, which any browser shows."""
    left = 16 + LETTER * max(len(layer.name) for layer in layers)
    rank = max(len(layer.values) for layer in layers)
    cell = min(CELL, WIDEST / rank)
    width = max(left + cell * rank + RIGHT, left + 220, 24 + LETTER * len(verdict))
    height = TOP + ROW * len(layers) + 40
    rows = [part for place, layer in enumerate(layers) for part in _row(layer, left, TOP + place * ROW, cell)]
    words = [
        tag("text", f"Spectrum of {title}", x=12, y=22, font_weight="600"),
        tag("text", verdict, x=12, y=40, class_="quiet"),
        tag("text", "direction 1", x=f"{left:g}", y=TOP - 8, class_="quiet"),
        tag("text", "singular value over the layer's largest; the line: 90 % of the energy is to its left",
            x=12, y=height - 14, class_="quiet"),
    ]  # fmt: skip
    return str(
        tag(
            "svg", tag("style", Markup(STYLE)), *words, *rows, xmlns="http://www.w3.org/2000/svg",
            width=f"{width:.0f}", height=height, role="img", aria_label=f"Spectrum of {title}: {verdict}",
        )
    ) + "\n"  # fmt: skip


def _row(layer: Layer, left: float, top: float, cell: float) -> list[Markup]:
    largest = max(layer.values) or 1.0
    cells = [
        tag("rect", tag("title", f"{layer.name}: direction {place + 1}, singular value {value:.4g}"),
            x=f"{left + place * cell:.1f}", y=f"{top:g}", width=f"{max(0.5, cell - 1):.1f}", height=ROW - 2,
            class_="cell", fill_opacity=f"{value / largest:.3f}")
        for place, value in enumerate(layer.values)
    ]  # fmt: skip
    at = f"{left + layer.held * cell - 0.5:.1f}"
    line = tag("line", x1=at, x2=at, y1=f"{top - 1:g}", y2=f"{top + ROW - 1:g}", class_="held")
    name = tag("text", layer.name, x=f"{left - 8:g}", y=f"{top + 12:g}", class_="end")
    return [name, *cells, line]
