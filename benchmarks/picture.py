"""The picture of a run in the README: `qlora demo --out RUN`, then `python benchmarks/picture.py RUN`.

What the run wrote down is kept in results/run.json, and docs/run.svg is drawn from that alone: a test draws it again.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.runs.report.axis import Axis, axis
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.series import Point, points, smoothed

ROOT = Path(__file__).parents[1]
RESULT, PICTURE = ROOT / "benchmarks" / "results" / "run.json", ROOT / "docs" / "run.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 330, 62, 20, 78, 46
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1d2126}.quiet{fill:#626a73;font-size:12px}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.big{font-size:16px;font-weight:600}.line{fill:none;stroke:#0072b2}"
    ".raw{opacity:.35}.smooth{stroke-width:2}.dot{fill:#d55e00}.rule{stroke:#e3e6e9}svg{background:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e2e5e8}.quiet{fill:#98a1aa}.line{stroke:#6db9ec}"
    ".dot{fill:#f0a35e}.rule{stroke:#2b3036}svg{background:#15181b}}"
)


def kept(run: Path) -> dict[str, Any]:
    """What the picture needs of a demo's folder."""
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


def drawn(found: dict[str, Any]) -> str:
    """The SVG of a run: training loss, held-out losses, and what came of it."""
    train, held = points(found["metrics"], "train", "loss"), points(found["metrics"], "eval", "eval_loss")
    x = axis([step for step, _ in (*train, *held)], from_zero=True, whole=True)
    y = axis([value for _, value in (*train, *held)], from_zero=True, margin=0.05)
    answers = f"right answers on held-out rows: {found['before']:.0%} before, {found['after']:.0%} after"
    words = [
        tag("text", answers, x=LEFT, y=26, class_="big"),
        tag("text", _told(found), x=LEFT, y=46, class_="quiet"),
        tag("text", "loss, nats a token", x=8, y=TOP - 10, class_="quiet"),
        tag("text", "optimizer step", x=WIDTH - RIGHT, y=HEIGHT - 8, class_="quiet end"),
        tag("text", "held out", x=WIDTH - RIGHT, y=TOP + 14, class_="end"),
        tag("circle", cx=WIDTH - RIGHT - 62, cy=TOP + 10, r=4, class_="dot"),
        tag("text", "training", x=WIDTH - RIGHT, y=TOP + 34, class_="end"),
        tag("path", d=f"M{WIDTH - RIGHT - 84} {TOP + 30}h24", class_="line smooth"),
    ]
    curves = [_path(train, x, y, "line raw"), _path(smoothed(train), x, y, "line smooth")]
    dots = [tag("circle", cx=f"{_x(x, at):.1f}", cy=f"{_y(y, value):.1f}", r=4, class_="dot") for at, value in held]
    parts = [tag("style", Markup(STYLE)), *_ruled(x, y), *words, *curves, *dots]
    size = {"width": WIDTH, "height": HEIGHT, "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    return str(tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=answers, **size)) + "\n"


def _told(found: dict[str, Any]) -> str:
    threads = f"{found['threads']} thread" + "s" * (found["threads"] != 1)
    return (
        f"qlora demo: {found['trainable_parameters']:,} weights train, {found['seconds']:.0f} s with {threads}, "
        f"{found['peak_bytes'] / 2**20:,.0f} MiB at most; merged model off by {found['mean_kl']:.0e} nats a token"
    )


def _ruled(x: Axis, y: Axis) -> list[Markup]:
    """Both axes: a rule and a label for each tick."""
    parts = []
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = _y(y, tick)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="rule"))
        parts.append(tag("text", label, x=LEFT - 8, y=f"{at + 4:.1f}", class_="quiet end"))
    for tick, label in zip(x.ticks, x.labels, strict=True):
        parts.append(tag("text", label, x=f"{_x(x, tick):.1f}", y=HEIGHT - BOTTOM + 20, class_="quiet middle"))
    return parts


def _path(curve: Sequence[Point], x: Axis, y: Axis, style: str) -> Markup:
    places = (f"{_x(x, step):.1f} {_y(y, value):.1f}" for step, value in curve)
    return tag("path", d="M" + "L".join(places), class_=style)


def _x(x: Axis, value: float) -> float:
    return LEFT + x.place(value) * (WIDTH - LEFT - RIGHT)


def _y(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM)


def main() -> None:
    """Keep what the run wrote down, where one is named, and draw the picture."""
    if sys.argv[1:]:
        RESULT.write_text(json.dumps(kept(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    PICTURE.write_text(drawn(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
