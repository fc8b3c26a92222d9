"""index.html: many runs as rows of one table that sorts and filters, each with a sparkline and its own settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora.runs.report import facts, number_format
from qlora.runs.report.html_document import html_document
from qlora.runs.report.html_tables import flat_settings
from qlora.runs.report.index_script import SCRIPT, SCRIPT_SOURCE
from qlora.runs.report.index_script import STYLE as INDEX_STYLE
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.run_data import RunData, number, string
from qlora.runs.report.series import Point, downsampled, points, smoothed
from qlora.runs.report.style import STYLE

_OWN_SETTINGS = ("train.output", "train.resume")  # of every run, so that they say nothing about its result
_FIGURES = ("created", "state", "held-out loss", "training loss", "steps", "tokens/s", "peak MiB", "seconds", "base")
_SPARK_POINTS, _WIDTH, _HEIGHT = 60, 120, 24


@dataclass(frozen=True)
class IndexedRun:
    """A run and the address of its page, relative to the index; empty if it has none."""

    run: RunData
    page: str
    problem: str = ""  # why its files could not be read


@dataclass(frozen=True)
class _Cell:
    text: str
    value: float | None = None  # that the column is sorted by


def index_page(title: str, runs: Sequence[IndexedRun]) -> str:
    """The page as an HTML document that makes no request."""
    settings = _different_settings([item.run for item in runs])
    cells = [_cells(item) | settings[index] for index, item in enumerate(runs)]
    names = [name for name in _FIGURES if any(name in row for row in cells)]
    names += [name for name in dict.fromkeys(name for row in cells for name in row) if name not in names]
    numeric = {name for name in names if all(row[name].value is not None for row in cells if name in row)}
    label = tag("label", "Filter ", tag("input", type="search", placeholder="words in a row", autocomplete="off"))
    rows = [_row(item, row, names, numeric) for item, row in zip(runs, cells, strict=True)]
    table = tag("table", tag("thead", _header(names, numeric)), tag("tbody", *rows))
    header = tag("header", tag("h1", title), tag("form", label, tag("output")))
    footer = tag("footer", "Written by qlora. One file; it loads nothing from the network.")
    content = tag("main", header, tag("div", table, class_="scroll"), footer)
    body = tag("body", content, tag("script", Markup(SCRIPT)), class_="index")
    return html_document(title, STYLE + INDEX_STYLE, body, script=SCRIPT_SOURCE)


def _cells(item: IndexedRun) -> dict[str, _Cell]:
    """The figures of a run by column; one that it does not have is left out."""
    run, manifest = item.run, item.run.manifest
    losses = facts.held_out_losses(run)
    train = points(run.metrics, "train", "loss")
    last = train[-1] if train else (None, None)
    steps, seconds = number(manifest, "result", "steps") or last[0], number(manifest, "seconds")
    values = {
        "held-out loss": (losses[-1][1] if losses else None, number_format.loss),
        "training loss": (number(manifest, "result", "loss") or last[1], number_format.loss),
        "steps": (steps, number_format.count),
        "tokens/s": (facts.median_speed(run), number_format.count),
        "peak MiB": (_scaled(facts.measured_peak_bytes(run), 2**20), number_format.count),
        "seconds": (seconds, number_format.count),
    }
    is_open = number(manifest, "running", "steps") is not None or not manifest
    words = {
        "created": string(manifest, "created")[:16].replace("T", " "),
        "state": item.problem or ("not finished" if is_open else "finished"),
        "base": string(manifest, "base", "name"),
    }
    cells = {name: _Cell(text) for name, text in words.items() if text}
    return cells | {name: _Cell(str(show(value)), value) for name, (value, show) in values.items() if value is not None}


def _scaled(value: float | None, unit: int) -> float | None:
    return None if value is None else value / unit


def _different_settings(runs: Sequence[RunData]) -> list[dict[str, _Cell]]:
    """Of each run, the settings that are not the same in all recipes."""
    recipes = [flat_settings(run.recipe_text) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in _OWN_SETTINGS)
    different = [key for key in keys if len({recipe.get(key, "") for recipe in recipes if recipe}) > 1]
    return [{key: _setting(recipe[key]) for key in different if recipe.get(key)} for recipe in recipes]


def _setting(text: str) -> _Cell:
    try:
        return _Cell(text, float(text))
    except ValueError:
        return _Cell(text)


def _header(names: Sequence[str], numeric: set[str]) -> Markup:
    columns = [
        tag("th", tag("button", name, type="button"), scope="col", data_numeric="" if name in numeric else None)
        for name in names
    ]
    run = tag("th", tag("button", "run", type="button"), scope="col")
    return tag("tr", run, tag("th", "loss", scope="col"), *columns)


def _row(item: IndexedRun, cells: Mapping[str, _Cell], names: Sequence[str], numeric: set[str]) -> Markup:
    name = tag("a", item.run.name, href=item.page) if item.page else item.run.name
    columns = []
    for column in names:
        cell = cells.get(column, _Cell(""))
        value = repr(cell.value) if cell.value is not None else ""
        class_ = "number" if column in numeric else None
        columns.append(tag("td", cell.text, data_value=value if column in numeric else None, class_=class_))
    return tag("tr", tag("th", name, scope="row"), tag("td", _sparkline(item.run)), *columns)


def _sparkline(run: RunData) -> Markup | None:
    """The training loss, smoothed, from its lowest to its highest value."""
    curve = downsampled(smoothed(points(run.metrics, "train", "loss")), _SPARK_POINTS)
    if len(curve) < 2:
        return None
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in _scaled_points(curve))
    name = f"training loss from {curve[0][1]:.4g} to {curve[-1][1]:.4g}"
    size = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "class_": "spark"}
    return tag("svg", tag("path", d=path), role="img", aria_label=name, **size)


def _scaled_points(curve: Sequence[Point]) -> list[Point]:
    (first, _), (last, _) = curve[0], curve[-1]
    values = [value for _, value in curve]
    low, span = min(values), max(values) - min(values) or 1.0
    steps = last - first or 1.0
    return [
        ((step - first) / steps * (_WIDTH - 4) + 2, (1 - (value - low) / span) * (_HEIGHT - 4) + 2)
        for step, value in curve
    ]
