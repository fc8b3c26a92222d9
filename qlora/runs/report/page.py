"""report.html: one run, or several over each other, on one self-contained page that asks nothing of any network."""

from collections.abc import Sequence

from qlora.runs.report import facts

from qlora.runs.report import figures

from qlora.runs.report import layers
from qlora.runs.report.markup import Markup, join, tag, text
from qlora.runs.report.run_data import RunData, number, section, word
from qlora.runs.report.style import STYLE
from qlora.runs.report.html_tables import different_settings, head_figures, recipes, samples, table

__all__ = ["RunData", "report_page"]

# The browser itself refuses every request, whatever a sample or a recipe may contain.
AGAIN_SECONDS = 30  # after which the page of a run that is not finished reads itself again from the disk
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report_page(runs: Sequence[RunData]) -> str:
    """The page as a whole HTML document. Parts whose data is missing are left out; no runs give a page that says so."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="refresh", content=AGAIN_SECONDS) if len(runs) == 1 and _unfinished(runs[0]) else None,
        tag("title", f"{title} \u00b7 qlora"),
        tag("style", Markup(STYLE)),
    )
    parts = [_header(title, runs), *_body(runs), _footer(runs)]
    body = tag("body", tag("main", *parts), class_="single" if len(runs) == 1 else "several")
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(title: str, runs: Sequence[RunData]) -> Markup:
    if len(runs) != 1:
        return tag("header", tag("h1", title), figures.legend(runs))
    state = tag("p", _unfinished(runs[0]), class_="what state") if _unfinished(runs[0]) else None
    return tag("header", tag("h1", title), tag("p", _what(runs[0]), class_="what"), state, head_figures(runs[0]))


def _unfinished(run: RunData) -> str:
    """How far a run is that has not ended; empty for one that has."""
    steps = number(section(run.manifest, "running"), "steps")
    if steps is None:
        return ""
    done = facts.result(run).get("steps", "0")
    when = word(run.manifest, "created")[:16].replace("T", " ")
    return f"not finished: step {done} of {steps:,.0f}, as of {when} UTC"


def _body(runs: Sequence[RunData]) -> list[Markup | None]:
    small = [figures.rate(runs), figures.speed(runs), figures.gradient(runs)]
    shared = [
        table("Result", runs, facts.result),
        table("Data", runs, facts.data),
        table("Base and adapter", runs, facts.setup),
        table("Machine and versions", runs, facts.machine),
    ]
    if len(runs) > 1:
        shared.insert(1, different_settings(runs))
    tables = tag("div", *shared, class_="tables") if any(shared) else None
    row = tag("div", *small, class_="row") if any(small) else None
    plots = [figures.loss(runs), row, figures.memory(runs), layers.spectrum(runs), figures.lengths(runs)]
    if not any([*plots, tables]):
        plots = [tag("p", "Nothing has been logged yet.", class_="what")]
    return (
        [*plots, samples(runs), tables, recipes(runs)]
        if len(runs) == 1
        else [*plots, tables, samples(runs), recipes(runs)]
    )


def _what(run: RunData) -> Markup:
    """The run in a line: base, storage, adapter, device, date."""
    manifest = run.manifest
    rank, alpha = word(manifest, "adapter", "rank"), facts.setup(run).get("alpha")
    adapter = " ".join(part for part in (word(manifest, "adapter", "kind"), f"rank {rank}" if rank else "") if part)
    parts = [
        word(manifest, "base", "name"),
        facts.stored_as(manifest).split(" (")[0],
        f"{adapter}, alpha {alpha}" if adapter and alpha else adapter,
        word(manifest, "machine", "device"),
        word(manifest, "created")[:16].replace("T", " "),
    ]
    first, *others = [part for part in parts if part] or [""]
    return join([first, *(Markup(" &middot; " + text(part)) for part in others)])


def _footer(runs: Sequence[RunData]) -> Markup:
    versions = sorted({version for run in runs if (version := word(run.manifest, "qlora"))})
    return tag(
        "footer", f"Written by qlora {', '.join(versions)}".strip() + ". One file; nothing is loaded from anywhere."
    )
