"""Which plots a page shows, for one run or for several over each other."""

from collections.abc import Sequence
from itertools import chain

from qlora.runs.report import number_format
from qlora.runs.report.axis import FEW, Axis, axis
from qlora.runs.report.facts import held_out, owners_of, peak_bytes, planned_bytes
from qlora.runs.report.markup import Markup, join, tag, text
from qlora.runs.report.run_data import RunData, number, section
from qlora.runs.report.series import Point, finite, half_window, points, quantile, smoothed, thinned
from qlora.runs.report.svg import Bar, Curve, Mark, bars, plot

COLOURS = 6  # of style.py; a seventh run takes the first colour again, dashed
_OUTLIERS = 0.01  # share of the raw losses that may lie above the plot, so that a spike does not flatten the rest


def loss(runs: Sequence[RunData]) -> Markup | None:
    """Training loss, raw and smoothed, with the held-out evaluations; None if nothing was logged."""
    raw = [points(run.metrics, "train", "loss") for run in runs]
    evaluations = [held_out(run) for run in runs]
    smooth = [smoothed(curve) for curve in raw]
    if not any(chain(raw, evaluations)):
        return None
    # The range is that of what is read off the plot; single raw losses may leave it, and are counted below it.
    inner = [quantile([value for _, value in curve], share) for curve in raw if curve for share in (0, 1 - _OUTLIERS)]
    y = axis([*inner, *(value for curve in (*smooth, *evaluations) for _, value in curve)], margin=0.04)
    curves = [Curve(_thin(curve), "raw", colour) for colour, curve in enumerate(raw)]
    curves += [Curve(_thin(curve), "smooth", colour) for colour, curve in enumerate(smooth)]
    curves += [Curve(curve, "held-out", colour, _said(curve)) for colour, curve in enumerate(evaluations)]
    curves = [_coloured(curve) for curve in curves]
    drawn = plot(
        _steps(*raw, *evaluations), y, curves, ("optimizer step", "nats per token"), "training and held-out loss"
    )
    above = sum(value > y.high for curve in raw for _, value in curve)
    return _figure("Loss", _loss_words(runs, raw, evaluations), drawn, note=_above_words(above), kind="wide")


def rate(runs: Sequence[RunData]) -> Markup | None:
    """The learning rate of each step."""
    return _simple(runs, "learning_rate", "Learning rate", "per step")


def speed(runs: Sequence[RunData]) -> Markup | None:
    """Tokens a second, padding not counted."""
    return _simple(runs, "tokens_per_second", "Throughput", "tokens/s")


def gradient(runs: Sequence[RunData]) -> Markup | None:
    """The norm of the gradient before it is clipped."""
    return _simple(runs, "grad_norm", "Gradient norm", "before clipping")


def memory(runs: Sequence[RunData]) -> Markup | None:
    """The memory plan by owner, laid end to end, against the measured peak; for several runs, their peaks."""
    return _owners(runs[0]) if len(runs) == 1 else _peaks(runs)


def lengths(runs: Sequence[RunData]) -> Markup | None:
    """How many rows have how many tokens; None for several runs, and for one that did not count."""
    found = section(runs[0].manifest, "data", "lengths") if len(runs) == 1 else {}
    counts = {name: number(found, name) or 0.0 for name in found}
    if not any(counts.values()):
        return None
    rows = [Bar(name.replace("<=", "up to "), number_format.count(count), 0.0, count) for name, count in counts.items()]
    x = axis([row.end for row in rows], from_zero=True, whole=True, about=FEW)
    return _figure("Tokens a row", None, bars(x, rows, [], "rows", "rows by their tokens"))


def legend(runs: Sequence[RunData]) -> Markup:
    """The colour of each run."""
    return tag("p", *(_key(f"smooth {_colour(index)}", run.name) for index, run in enumerate(runs)), class_="legend")


def _simple(runs: Sequence[RunData], key: str, title: str, unit: str) -> Markup | None:
    found = [points(run.metrics, "train", key) for run in runs]
    values = [value for curve in found for _, value in curve]
    if not values:
        return None
    curves = [_coloured(Curve(_thin(curve), "thin", colour)) for colour, curve in enumerate(found)]
    drawn = plot(
        _steps(*found), axis(values, from_zero=True, margin=0.04), curves, ("optimizer step", unit), title.lower()
    )
    return _figure(title, None, drawn)


def _owners(run: RunData) -> Markup | None:
    owners, peak, planned = owners_of(run.manifest), peak_bytes(run), planned_bytes(run.manifest)
    if peak is None and planned is None:
        return None
    unit, one = number_format.unit_of(max(peak or 0, planned or 0))
    rows, start = [], 0.0
    for name, size in owners.items():
        rows.append(Bar(name.replace("_", " "), f"{size / one:,.2f} {unit}", start / one, (start + size) / one))
        start += size
    if planned and not owners:
        rows.append(Bar("planned", f"{planned / one:,.2f} {unit}", 0.0, planned / one))
    if peak and not rows:
        rows, marks = [Bar("measured", f"{peak / one:,.2f} {unit}", 0.0, peak / one)], []
    else:
        marks = [Mark(f"measured peak {peak / one:,.2f} {unit}", peak / one)] if peak else []
    x = axis([row.end for row in rows] + [mark.at for mark in marks], from_zero=True, about=FEW)
    return _figure(
        "Memory", None, bars(x, rows, marks, unit, "memory by owner"), note=_memory_words(run, peak, planned)
    )


def _peaks(runs: Sequence[RunData]) -> Markup | None:
    peaks = [(index, run, peak) for index, run in enumerate(runs) if (peak := peak_bytes(run))]
    if not peaks:
        return None
    unit, one = number_format.unit_of(max(peak for _, _, peak in peaks))
    rows = [Bar(run.name, f"{peak / one:,.2f} {unit}", 0.0, peak / one, index % COLOURS) for index, run, peak in peaks]
    x = axis([row.end for row in rows], from_zero=True, about=FEW)
    return _figure("Peak memory, measured", None, bars(x, rows, [], unit, "measured peak memory of each run"))


def _figure(title: str, keys: Markup | None, drawn: Markup, note: str = "", kind: str = "") -> Markup:
    caption = tag("figcaption", tag("h3", title), keys)
    return tag("figure", caption, drawn, tag("p", note, class_="note") if note else None, class_=kind or None)


def _loss_words(
    runs: Sequence[RunData], raw: Sequence[Sequence[Point]], evaluations: Sequence[Sequence[Point]]
) -> Markup:
    wide = max((2 * half_window(len(curve)) + 1 for curve in raw), default=1)
    one = len(runs) == 1
    keys = [
        _key("raw c0", "training, each logged step") if any(raw) else None,
        _key("smooth c0", f"mean of {wide} neighbours") if wide > 1 else None,
        _key("dot held-out c0", "held out") if any(evaluations) else None,
    ]
    return tag("p", *keys, class_="legend" if one else "legend plain")


def _above_words(above: int) -> str:
    if not above:
        return ""
    return f"{above} single {'step lies' if above == 1 else 'steps lie'} above the plot."


def _memory_words(run: RunData, peak: float | None, planned: float | None) -> str:
    card = number(run.manifest, "machine", "device_bytes")
    parts = [
        f"Planned {number_format.size(planned)}" if planned else "Nothing was planned",
        f"measured {number_format.size(peak)}" if peak else "not measured yet",
        f"{number_format.change(planned, peak)} against the plan" if peak and planned else "",
        f"the device has {number_format.size(card)}" if card else "",
    ]
    return ", ".join(part for part in parts if part) + "."


def _key(style: str, words: str) -> Markup:
    """A legend entry: a sample of the line or dot, and what it is."""
    sample = (
        tag("circle", cx="9", cy="6", r="3.2", class_=style)
        if style.startswith("dot")
        else tag("path", d="M0 6H18", class_=style)
    )
    return tag("span", tag("svg", sample, class_="key", aria_hidden="true"), join((" ", text(words))), class_="entry")


def _steps(*curves: Sequence[Point]) -> Axis:
    steps = [step for curve in curves for step, _ in curve]
    return axis(steps, from_zero=True, whole=True)


def _thin(curve: Sequence[Point]) -> list[Point]:
    return thinned(curve)


def _said(curve: Sequence[Point]) -> list[str]:
    return [f"step {step:,.0f}: held-out loss {value:.4f}" for step, value in curve if finite(value)]


def _colour(index: int) -> str:
    return f"c{index % COLOURS}" + (" again" if index >= COLOURS else "")


def _coloured(curve: Curve) -> Curve:
    style = f"{curve.style} again" if curve.colour >= COLOURS else curve.style
    return Curve(curve.points, style, curve.colour % COLOURS, curve.dots)
