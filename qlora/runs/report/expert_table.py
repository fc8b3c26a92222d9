"""Load of experts in a report: for each layer of experts how evenly tokens visit them, before and after training."""

import math
from collections.abc import Sequence

from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.run_data import RunData, number, section
from qlora.runs.report.series import finite

ARROW = " \u2192 "
NOTE = (
    "Share of tokens by expert, on the same {tokens:,.0f} tokens of the training data. Effective: how many experts "
    "would have this load if all of them had the same (the exponential of the entropy). The router is frozen and "
    "its auxiliary loss is 0; what it reads changes with the layers before it."
)


def expert_table(run: RunData) -> Markup | None:
    """A row for each layer of experts; None for a run without them."""
    before, after = (section(run.manifest, "experts", key) for key in ("before", "after"))
    rows = [row for path in before if (row := _row(path, _shares(before.get(path)), _shares(after.get(path))))]
    if not rows:
        return None
    names = ("layer", "experts visited", "effective", "largest share")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    note = NOTE.format(tokens=number(run.manifest, "experts", "tokens") or 0)
    content = tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll")
    return tag("section", tag("h2", "Load of experts"), content, tag("p", note, class_="note"), class_="facts")


def _row(path: str, before: Sequence[float], after: Sequence[float]) -> Markup | None:
    loads = [shares for shares in (before, after) if shares]
    if not loads:
        return None
    visited = ARROW.join(str(sum(share > 0 for share in shares)) for shares in loads)
    effective = ARROW.join(f"{_effective(shares):.1f}" for shares in loads)
    largest = ARROW.join(f"{max(shares):.1%}" for shares in loads)
    cells = (f"{visited} of {len(loads[0])}", effective, largest)
    layer = next((step for step in path.split(".") if step.isdigit()), path)
    return tag("tr", tag("th", tag("span", layer, title=path), scope="row"), *(tag("td", cell) for cell in cells))


def _effective(shares: Sequence[float]) -> float:
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def _shares(values: object) -> list[float]:
    return [float(value) for value in values if finite(value)] if isinstance(values, list | tuple) else []  # type: ignore[arg-type]
