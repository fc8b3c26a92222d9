"""The spectrum by layer: of the rank that each adapted matrix has, how many directions its update uses."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.runs.report.facts import adapted_paths
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.run_data import RunData, number, section

Place = tuple[str, str]  # decoder layer, matrix


def spectrum(runs: Sequence[RunData]) -> Markup | None:
    """A row a decoder layer, a column a matrix, darker where more of the rank is used; None for several runs."""
    found = section(runs[0].manifest, "spectrum") if len(runs) == 1 else {}
    known = [path for path in adapted_paths(runs[0].manifest) if path in found]  # as the model calls them, q before v
    cells = {place_of(path): section(found, path) for path in (*known, *found)}
    if not cells:
        return None
    layers = sorted({layer for layer, _ in cells}, key=lambda name: (not name.isdigit(), name.zfill(6)))
    names = list(dict.fromkeys(name for _, name in cells))
    head = tag("tr", tag("th", "layer", scope="col"), *(tag("th", _short(name), scope="col") for name in names))
    rows = [
        tag("tr", tag("th", layer, scope="row"), *(_cell(cells.get((layer, name), {}), name) for name in names))
        for layer in layers
    ]
    ranks = {int(number(cell, "rank") or 0) for cell in cells.values()}
    note = (
        f"Directions that hold 90 % of the energy of a matrix's update, of {'/'.join(map(str, sorted(ranks)))} that it "
        "has. Nearly all of them used: a higher rank may learn more; few: a lower one does."
    )
    whole = tag("table", tag("thead", head), tag("tbody", *rows), class_="heat")
    caption = tag("figcaption", tag("h3", "Spectrum by layer"))
    return tag("figure", caption, tag("div", whole, class_="scroll"), tag("p", note, class_="note"))


def place_of(path: str) -> Place:
    """`("3", "q_proj")` for model.layers.3.self_attn.q_proj; without a number the path above stands for the layer."""
    *above, name = path.split(".")
    layer = next((step for step in above if step.isdigit()), ".".join(above) or "-")
    return layer, name


def _cell(cell: Mapping[str, Any], name: str) -> Markup:
    rank, used = number(cell, "rank"), number(cell, "energy_90_rank")
    if not rank or used is None:
        return tag("td")
    stable, norm = number(cell, "stable_rank") or 0.0, number(cell, "norm") or 0.0
    told = f"{name}: {used:.0f} of {rank:.0f} directions, stable rank {stable:.2f}, norm of the update {norm:.3g}"
    return tag("td", f"{used:.0f}", title=told, style=f"--used:{100 * used / rank:.0f}%")


def _short(name: str) -> str:
    return name.removesuffix("_proj")
