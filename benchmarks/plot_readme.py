"""Loss curve of a demo run for the README: `qlora demo --out RUN`, then `python benchmarks/plot_readme.py RUN`.

results/run.json keeps the run's figures, and docs/run.svg is drawn from that file alone: a test draws it again.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.runs.report.axis import Axis, build_axis
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.series import Point, points, smoothed

ROOT = Path(__file__).parents[1]
RESULT, PLOT = ROOT / "benchmarks" / "results" / "run.json", ROOT / "docs" / "run.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 330, 62, 20, 78, 46
STYLE = (  # CSS
    "text{font:13px system-ui,sans-serif;fill:#1d2126}.quiet{fill:#626a73;font-size:12px}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.big{font-size:16px;font-weight:600}.line{fill:none;stroke:#0072b2}"
    ".raw{opacity:.35}.smooth{stroke-width:2}.dot{fill:#d55e00}.rule{stroke:#e3e6e9}svg{background:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e2e5e8}.quiet{fill:#98a1aa}.line{stroke:#6db9ec}"
    ".dot{fill:#f0a35e}.rule{stroke:#2b3036}svg{background:#15181b}}"
)


def read_run(run: Path) -> dict[str, Any]:
    """The figures that the plot needs, from the folder of a demo run."""
    manifest, scores = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("run.json", "demo.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("event", "step", "loss", "eval_loss")
    return {
        "parameters": manifest["adapter"]["parameters"],
        "trainable_parameters": manifest["adapter"]["trainable_parameters"],
        "peak_bytes": manifest["memory"]["peak_bytes"],
        "threads": manifest["machine"]["threads"],
        "seconds": round(manifest["seconds"], 1),
        "before": scores["before"],
        "after": scores["after"],
        "mean_kl": scores["agreement"]["mean_kl"],
        "metrics": [{key: line[key] for key in keys if key in line} for line in lines],
    }


def draw(run: dict[str, Any]) -> str:
    """The SVG of a run: training loss, held-out losses, and a summary."""
    train, held_out = points(run["metrics"], "train", "loss"), points(run["metrics"], "eval", "eval_loss")
    x = build_axis([step for step, _ in (*train, *held_out)], from_zero=True, integers=True)
    y = build_axis([value for _, value in (*train, *held_out)], from_zero=True, margin=0.05)
    answers = f"right answers on held-out rows: {run['before']:.0%} before, {run['after']:.0%} after"
    labels = [
        tag("text", answers, x=LEFT, y=26, class_="big"),
        tag("text", _summary(run), x=LEFT, y=46, class_="quiet"),
        tag("text", "loss, nats a token", x=8, y=TOP - 10, class_="quiet"),
        tag("text", "optimizer step", x=WIDTH - RIGHT, y=HEIGHT - 8, class_="quiet end"),
        tag("text", "held out", x=WIDTH - RIGHT, y=TOP + 14, class_="end"),
        tag("circle", cx=WIDTH - RIGHT - 62, cy=TOP + 10, r=4, class_="dot"),
        tag("text", "training", x=WIDTH - RIGHT, y=TOP + 34, class_="end"),
        tag("path", d=f"M{WIDTH - RIGHT - 84} {TOP + 30}h24", class_="line smooth"),
    ]
    curves = [_path(train, x, y, "line raw"), _path(smoothed(train), x, y, "line smooth")]
    dots = [
        tag("circle", cx=f"{_x(x, step):.1f}", cy=f"{_y(y, value):.1f}", r=4, class_="dot") for step, value in held_out
    ]
    parts = [tag("style", Markup(STYLE)), *_gridlines(x, y), *labels, *curves, *dots]
    size = {"width": WIDTH, "height": HEIGHT, "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    return str(tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=answers, **size)) + "\n"


def _summary(run: dict[str, Any]) -> str:
    threads = f"{run['threads']} thread" + "s" * (run["threads"] != 1)
    return (
        f"qlora demo: {run['trainable_parameters']:,} weights train, {run['seconds']:.0f} s with {threads}, "
        f"{run['peak_bytes'] / 2**20:,.0f} MiB at most; merged model off by {run['mean_kl']:.0e} nats a token"
    )


def _gridlines(x: Axis, y: Axis) -> list[Markup]:
    """Both axes: a line and a label for each tick."""
    parts = []
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = _y(y, tick)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="rule"))
        parts.append(tag("text", label, x=LEFT - 8, y=f"{at + 4:.1f}", class_="quiet end"))
    for tick, label in zip(x.ticks, x.labels, strict=True):
        parts.append(tag("text", label, x=f"{_x(x, tick):.1f}", y=HEIGHT - BOTTOM + 20, class_="quiet middle"))
    return parts


def _path(curve: Sequence[Point], x: Axis, y: Axis, style: str) -> Markup:
    coordinates = (f"{_x(x, step):.1f} {_y(y, value):.1f}" for step, value in curve)
    return tag("path", d="M" + "L".join(coordinates), class_=style)


def _x(x: Axis, value: float) -> float:
    return LEFT + x.fraction(value) * (WIDTH - LEFT - RIGHT)


def _y(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.fraction(value) * (HEIGHT - TOP - BOTTOM)


def main() -> None:
    """Read the run's folder, if one is named, into results/run.json; then draw the plot."""
    if sys.argv[1:]:
        RESULT.write_text(json.dumps(read_run(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    PLOT.write_text(draw(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
