"""The spectrum by layer: a row for each decoder layer, a column for each matrix, how much of its rank an update uses.

Drawn in report.html, and as the SVG file of `qlora inspect --picture`. Where the singular values are known (the run's
manifest does not have them), each cell shows one mark per direction; else its shade is the share of the rank in use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora.runs.report.facts import adapted_paths
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.run_data import RunData, number, section

ROW, LETTER, PADDING = 21, 6.6, 14  # pixels: a row, a letter of a label, the space around a label
MIN_COLUMN = 42  # pixels
DIRECTION, MAX_DIRECTIONS = 18, 160  # pixels of one direction, and of all directions of a matrix
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # columns; others follow
COUNT = 30  # pixels of the number after the directions
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1d2126}.quiet{fill:#626a73}.middle{text-anchor:middle}"
    ".cell{fill:#0072b2}.energy{stroke:#b84d00;stroke-width:2}svg{background:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e2e5e8}.quiet{fill:#98a1aa}.cell{fill:#6db9ec}"
    ".energy{stroke:#f0a35e}svg{background:#15181b}}"
)


@dataclass(frozen=True)
class UpdateSpectrum:
    """The update of one adapted matrix: how many of its directions hold 90 % of its energy."""

    path: str
    rank: int
    energy_90_rank: int
    stable_rank: float
    norm: float
    values: Sequence[float] = ()  # singular values, largest first, where they are known


@dataclass(frozen=True)
class Grid:
    """The drawing: its elements, and its size in pixels."""

    elements: Sequence[Markup]
    width: float
    height: float


def spectrum_figure(runs: Sequence[RunData]) -> Markup | None:
    """The figure of a report; None for several runs, and for a run without an adapter."""
    spectra = _spectra(runs[0]) if len(runs) == 1 else []
    if not spectra:
        return None
    grid = draw_grid(spectra)
    ranks = sorted({update.rank for update in spectra})
    note = (
        f"Directions that hold 90 % of the energy of a matrix's update, of {'/'.join(map(str, ranks))} that it "
        "has. If nearly all are used, a higher rank may learn more; if few are used, a lower rank is enough."
    )
    drawing = tag("svg", *grid.elements, class_="spectrum", width=f"{grid.width:.0f}", height=f"{grid.height:.0f}")
    caption = tag("figcaption", tag("h3", "Spectrum by layer"))
    return tag("figure", caption, tag("div", drawing, class_="scroll"), tag("p", note, class_="note"))


def spectrum_svg(title: str, spectra: Sequence[UpdateSpectrum], verdict: str) -> str:
    """The drawing as an SVG document, which any browser shows."""
    grid = draw_grid(spectra, left=12, top=56)
    width, height = max(grid.width + 12, 24 + LETTER * len(verdict), 480), grid.height + 34
    legend = "marks: singular values over the largest; line and number: the directions that hold 90 % of the energy"
    texts = [
        tag("text", f"Spectrum of {title}", x=12, y=22, font_weight="600"),
        tag("text", verdict, x=12, y=40, class_="quiet"),
        tag("text", legend, x=12, y=f"{height - 14:g}", class_="quiet"),
    ]
    document = tag(
        "svg", tag("style", Markup(STYLE)), *texts, *grid.elements, xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}", height=f"{height:.0f}",
        style="max-width:100%;height:auto", role="img", aria_label=f"Spectrum of {title}: {verdict}",
    )  # fmt: skip
    return f"{document}\n"


def draw_grid(spectra: Sequence[UpdateSpectrum], left: float = 0, top: float = 0) -> Grid:
    """The cells of all updates with the names of layers and matrices, from the corner (left, top)."""
    cells = _positions(spectra)
    layers = sorted({layer for layer, _ in cells}, key=lambda name: (not name.isdigit(), name.zfill(6)))
    names = sorted(dict.fromkeys(name for _, name in cells), key=lambda name: [*ORDER, name].index(name))
    marks = max(min(DIRECTION * len(update.values), MAX_DIRECTIONS) for update in spectra)
    widths = [max(_label_width(_short(name)), marks + COUNT if marks else MIN_COLUMN) for name in names]
    x = left + max(_label_width(label) for label in ("layer", *layers))
    elements = [
        _label("layer", left, x, top),
        *(_label(layer, left, x, top + ROW * row) for row, layer in enumerate(layers, 1)),
    ]
    for name, width in zip(names, widths, strict=True):
        elements.append(_label(_short(name), x, x + width, top))
        for row, layer in enumerate(layers, 1):
            if (layer, name) in cells:
                elements += _cell(cells[layer, name], x, top + ROW * row, width)
        x += width
    return Grid(elements, x, top + ROW * (len(layers) + 1))


def position_of(path: str) -> tuple[str, str]:
    """Layer and matrix: `("3", "q_proj")` of model.layers.3.self_attn.q_proj; without a number, the parent's path."""
    *parents, name = path.split(".")
    layer = next((step for step in parents if step.isdigit()), ".".join(parents) or "-")
    return layer, name


def _positions(spectra: Sequence[UpdateSpectrum]) -> dict[tuple[str, str], UpdateSpectrum]:
    """The updates by layer and matrix; a second matrix of one name in a layer has its path as name."""
    cells: dict[tuple[str, str], UpdateSpectrum] = {}
    for update in spectra:
        layer, name = position_of(update.path)
        cells[layer, update.path if (layer, name) in cells else name] = update
    return cells


def _spectra(run: RunData) -> list[UpdateSpectrum]:
    """The updates in the manifest, in the order of the model: q before v."""
    summary = section(run.manifest, "spectrum")
    paths = dict.fromkeys((*(path for path in adapted_paths(run.manifest) if path in summary), *summary))
    updates = (_update(path, section(summary, path)) for path in paths)
    return [update for update in updates if update]


def _update(path: str, values: Mapping[str, object]) -> UpdateSpectrum | None:
    rank, used = number(values, "rank"), number(values, "energy_90_rank")
    if not rank or used is None:
        return None
    return UpdateSpectrum(
        path, int(rank), int(used), number(values, "stable_rank") or 0.0, number(values, "norm") or 0.0
    )


def _cell(update: UpdateSpectrum, x: float, y: float, width: float) -> list[Markup]:
    """The cell of an update: its directions or its shade, and how many directions hold 90 % of the energy."""
    summary = (
        f"{update.path}: {update.energy_90_rank} of {update.rank} directions, stable rank {update.stable_rank:.2f}, "
        f"norm of the update {update.norm:.3g}"
    )
    if not update.values:
        count = tag("text", update.energy_90_rank, x=f"{x + width / 2:g}", y=f"{y + 15:g}", class_="middle")
        return [_mark(summary, x, y, width, ROW, 0.6 * update.energy_90_rank / update.rank), count]
    step = min(DIRECTION, MAX_DIRECTIONS / len(update.values))
    largest = max(update.values) or 1.0
    marks = [
        _mark(f"{update.path}: direction {index + 1}, singular value {value:.4g}",
              x + index * step, y + 2, max(0.5, step - 1), ROW - 4, value / largest)
        for index, value in enumerate(update.values)
    ]  # fmt: skip
    end = f"{x + update.energy_90_rank * step - 0.5:.1f}"
    line = tag("line", x1=end, x2=end, y1=f"{y + 1:g}", y2=f"{y + ROW - 1:g}", class_="energy")
    right = x + len(update.values) * step + 4
    return [*marks, line, tag("text", tag("title", summary), update.energy_90_rank, x=f"{right:.1f}", y=f"{y + 15:g}")]


def _mark(title: str, x: float, y: float, width: float, height: float, opacity: float) -> Markup:
    return tag(
        "rect", tag("title", title), x=f"{x:.1f}", y=f"{y:g}", width=f"{width:.1f}", height=f"{height:g}",
        class_="cell", fill_opacity=f"{opacity:.3f}",
    )  # fmt: skip


def _label(text: str, left: float, right: float, top: float) -> Markup:
    return tag("text", text, x=f"{(left + right) / 2:.1f}", y=f"{top + 15:g}", class_="quiet middle")


def _label_width(text: str) -> float:
    return LETTER * len(text) + PADDING


def _short(name: str) -> str:
    return name.removesuffix("_proj")
