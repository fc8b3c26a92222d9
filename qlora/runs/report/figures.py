"""The plots of a page, for one run or for several over each other."""

from collections.abc import Sequence
from itertools import chain

from qlora.runs.report import number_format
from qlora.runs.report.axis import FEW_TICKS, Axis, build_axis
from qlora.runs.report.compared_answers import keys_of
from qlora.runs.report.facts import component_bytes, held_out_losses, measured_peak_bytes, planned_bytes
from qlora.runs.report.markup import Markup, join, tag, text
from qlora.runs.report.run_data import RunData, number, section
from qlora.runs.report.series import Point, downsampled, finite, half_window, points, quantile, smoothed
from qlora.runs.report.svg import Bar, Curve, Mark, bar_chart, plot

COLORS = 6  # of style.py; the seventh run has the first color again, dashed
_OUTLIERS = 0.01  # share of the raw losses that may be above the plot, so that a spike does not flatten the rest


def loss(runs: Sequence[RunData]) -> Markup | None:
    """Training loss, raw and smoothed, and the held-out evaluations; None if nothing was logged."""
    raw = [points(run.metrics, "train", "loss") for run in runs]
    evaluations = [held_out_losses(run) for run in runs]
    smooth = [smoothed(curve) for curve in raw]
    if not any(chain(raw, evaluations)):
        return None
    # The range fits the smoothed curves and the evaluations; single raw losses may be above it, and are counted.
    inner = [quantile([value for _, value in curve], share) for curve in raw if curve for share in (0, 1 - _OUTLIERS)]
    y = build_axis([*inner, *(value for curve in (*smooth, *evaluations) for _, value in curve)], margin=0.04)
    curves = [Curve(downsampled(curve), "raw", color) for color, curve in enumerate(raw)]
    curves += [Curve(downsampled(curve), "smooth", color) for color, curve in enumerate(smooth)]
    curves += [Curve(curve, "held-out", color, _tooltips(curve)) for color, curve in enumerate(evaluations)]
    curves = [_colored(curve) for curve in curves]
    drawing = plot(
        _step_axis(*raw, *evaluations), y, curves, ("optimizer step", "nats per token"), "training and held-out loss"
    )
    above = sum(value > y.high for curve in raw for _, value in curve)
    return _figure("Loss", _loss_legend(runs, raw, evaluations), drawing, note=_above_note(above), kind="wide")


def rate(runs: Sequence[RunData]) -> Markup | None:
    """The learning rate of each step."""
    return _simple(runs, "learning_rate", "Learning rate", "per step")


def speed(runs: Sequence[RunData]) -> Markup | None:
    """Tokens per second, without padding."""
    return _simple(runs, "tokens_per_second", "Throughput", "tokens/s")


def gradient(runs: Sequence[RunData]) -> Markup | None:
    """The norm of the gradient before clipping."""
    return _simple(runs, "grad_norm", "Gradient norm", "before clipping")


def answers(runs: Sequence[RunData]) -> list[Markup | None]:
    """Margin, accuracy and log-probability of an objective that compares answers; none for any other."""
    return [_simple(runs, *curve) for curve in keys_of(runs)]


def memory(runs: Sequence[RunData]) -> Markup | None:
    """The memory plan by component, end to end, with the measured peak; for several runs, their peaks."""
    return _components(runs[0]) if len(runs) == 1 else _peaks(runs)


def lengths(runs: Sequence[RunData]) -> Markup | None:
    """A histogram of examples by length; None for several runs, and for a manifest without it."""
    histogram = section(runs[0].manifest, "data", "lengths") if len(runs) == 1 else {}
    counts = {name: number(histogram, name) or 0.0 for name in histogram}
    if not any(counts.values()):
        return None
    rows = [Bar(name.replace("<=", "up to "), number_format.count(count), 0.0, count) for name, count in counts.items()]
    x = build_axis([row.end for row in rows], from_zero=True, integers=True, count=FEW_TICKS)
    return _figure("Tokens per example", None, bar_chart(x, rows, [], "examples", "examples by number of tokens"))


def legend(runs: Sequence[RunData]) -> Markup:
    """The color of each run."""
    return tag("p", *(_key(f"smooth {_color(index)}", run.name) for index, run in enumerate(runs)), class_="legend")


def _simple(runs: Sequence[RunData], key: str, title: str, unit: str) -> Markup | None:
    data = [points(run.metrics, "train", key) for run in runs]
    values = [value for curve in data for _, value in curve]
    if not values:
        return None
    curves = [_colored(Curve(downsampled(curve), "thin", color)) for color, curve in enumerate(data)]
    y = build_axis(values, from_zero=min(values) >= 0, margin=0.04)
    return _figure(title, None, plot(_step_axis(*data), y, curves, ("optimizer step", unit), title.lower()))


def _components(run: RunData) -> Markup | None:
    components, peak, planned = component_bytes(run.manifest), measured_peak_bytes(run), planned_bytes(run.manifest)
    if peak is None and planned is None:
        return None
    unit, size = number_format.unit_of(max(peak or 0, planned or 0))
    rows, start = [], 0.0
    for name, bytes_used in components.items():
        end = start + bytes_used
        rows.append(Bar(name.replace("_", " "), f"{bytes_used / size:,.2f} {unit}", start / size, end / size))
        start = end
    if planned and not components:
        rows.append(Bar("planned", f"{planned / size:,.2f} {unit}", 0.0, planned / size))
    if peak and not rows:
        rows, marks = [Bar("measured", f"{peak / size:,.2f} {unit}", 0.0, peak / size)], []
    else:
        marks = [Mark(f"measured peak {peak / size:,.2f} {unit}", peak / size)] if peak else []
    x = build_axis([row.end for row in rows] + [mark.at for mark in marks], from_zero=True, count=FEW_TICKS)
    drawing = bar_chart(x, rows, marks, unit, "memory by component")
    return _figure("Memory", None, drawing, note=_memory_note(run, peak, planned))


def _peaks(runs: Sequence[RunData]) -> Markup | None:
    peaks = [(index, run, peak) for index, run in enumerate(runs) if (peak := measured_peak_bytes(run))]
    if not peaks:
        return None
    unit, size = number_format.unit_of(max(peak for _, _, peak in peaks))
    rows = [Bar(run.name, f"{peak / size:,.2f} {unit}", 0.0, peak / size, index % COLORS) for index, run, peak in peaks]
    x = build_axis([row.end for row in rows], from_zero=True, count=FEW_TICKS)
    drawing = bar_chart(x, rows, [], unit, "measured peak memory of each run")
    return _figure("Peak memory, measured", None, drawing)


def _figure(title: str, legend: Markup | None, drawing: Markup, note: str = "", kind: str = "") -> Markup:
    caption = tag("figcaption", tag("h3", title), legend)
    return tag("figure", caption, drawing, tag("p", note, class_="note") if note else None, class_=kind or None)


def _loss_legend(
    runs: Sequence[RunData], raw: Sequence[Sequence[Point]], evaluations: Sequence[Sequence[Point]]
) -> Markup:
    window = max((2 * half_window(len(curve)) + 1 for curve in raw), default=1)
    keys = [
        _key("raw c0", "training, each logged step") if any(raw) else None,
        _key("smooth c0", f"mean of {window} steps") if window > 1 else None,
        _key("dot held-out c0", "held out") if any(evaluations) else None,
    ]
    return tag("p", *keys, class_="legend" if len(runs) == 1 else "legend plain")


def _above_note(above: int) -> str:
    if not above:
        return ""
    return f"{above} {'step is' if above == 1 else 'steps are'} above the plot."


def _memory_note(run: RunData, peak: float | None, planned: float | None) -> str:
    device = number(run.manifest, "machine", "device_bytes")
    terms = [
        f"Planned {number_format.size(planned)}" if planned else "Nothing was planned",
        f"measured {number_format.size(peak)}" if peak else "not measured yet",
        f"{number_format.change(planned, peak)} against the plan" if peak and planned else "",
        f"the device has {number_format.size(device)}" if device else "",
    ]
    return ", ".join(term for term in terms if term) + "."


def _key(style: str, label: str) -> Markup:
    """A legend entry: a sample of the line or dot, and its label."""
    sample = (
        tag("circle", cx="9", cy="6", r="3.2", class_=style)
        if style.startswith("dot")
        else tag("path", d="M0 6H18", class_=style)
    )
    return tag("span", tag("svg", sample, class_="key", aria_hidden="true"), join((" ", text(label))), class_="entry")


def _step_axis(*curves: Sequence[Point]) -> Axis:
    return build_axis([step for curve in curves for step, _ in curve], from_zero=True, integers=True)


def _tooltips(curve: Sequence[Point]) -> list[str]:
    return [f"step {step:,.0f}: held-out loss {value:.4f}" for step, value in curve if finite(value)]


def _color(index: int) -> str:
    return f"c{index % COLORS}" + (" dashed" if index >= COLORS else "")


def _colored(curve: Curve) -> Curve:
    style = f"{curve.style} dashed" if curve.color >= COLORS else curve.style
    return Curve(curve.points, style, curve.color % COLORS, curve.dots)
