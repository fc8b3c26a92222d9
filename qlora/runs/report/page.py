"""report.html: one run, or several over each other, on one self-contained page that makes no request."""

from collections.abc import Sequence

from qlora.runs.report import facts, figures
from qlora.runs.report.benchmark_facts import benchmark_facts
from qlora.runs.report.expert_table import expert_table
from qlora.runs.report.html_document import html_document
from qlora.runs.report.html_tables import different_settings, head_figures, recipes, samples, table
from qlora.runs.report.markup import Markup, join, tag, text
from qlora.runs.report.prompt_answers import prompt_answers
from qlora.runs.report.run_data import RunData, number, section, string
from qlora.runs.report.spectrum_page import spectrum_figure
from qlora.runs.report.style import STYLE

REFRESH_SECONDS = 30  # the page of a run in progress is reloaded from the disk after this time


def report_page(runs: Sequence[RunData], first: Markup | None = None) -> str:
    """The page as an HTML document, `first` above its plots. Sections without data are left out."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    refresh = REFRESH_SECONDS if len(runs) == 1 and _progress(runs[0]) else None
    sections = [_header(title, runs), first, *_body(runs), _footer(runs)]
    body = tag("body", tag("main", *sections), class_="single" if len(runs) == 1 else "several")
    return html_document(title, STYLE, body, refresh=refresh)


def _header(title: str, runs: Sequence[RunData]) -> Markup:
    if len(runs) != 1:
        return tag("header", tag("h1", title), figures.legend(runs))
    state = tag("p", _progress(runs[0]), class_="what state") if _progress(runs[0]) else None
    return tag("header", tag("h1", title), tag("p", _summary(runs[0]), class_="what"), state, head_figures(runs[0]))


def _progress(run: RunData) -> str:
    """The step of a run in progress; empty for a finished run."""
    steps = number(section(run.manifest, "running"), "steps")
    if steps is None:
        return ""
    step = facts.result(run).get("steps", "0")
    time = string(run.manifest, "created")[:16].replace("T", " ")
    return f"not finished: step {step} of {steps:,.0f}, as of {time} UTC"


def _body(runs: Sequence[RunData]) -> list[Markup | None]:
    small = [figures.rate(runs), figures.speed(runs), figures.gradient(runs)]
    facts_tables = [
        table("Result", runs, facts.result),
        table("lm-evaluation-harness", runs, benchmark_facts),
        table("Data", runs, facts.data),
        table("Base and adapter", runs, facts.setup),
        table("Machine and versions", runs, facts.machine),
    ]
    if len(runs) > 1:
        facts_tables.insert(1, different_settings(runs))
    tables = tag("div", *facts_tables, class_="tables") if any(facts_tables) else None
    row = tag("div", *small, class_="row") if any(small) else None
    compared = figures.answers(runs)
    answers = tag("div", *compared, class_="row") if any(compared) else None
    plots = [figures.loss(runs), answers, row, figures.memory(runs), spectrum_figure(runs), figures.lengths(runs)]
    if not any([*plots, tables]):
        plots = [tag("p", "Nothing has been logged yet.", class_="what")]
    if len(runs) == 1:
        return [*plots, samples(runs), prompt_answers(runs), tables, expert_table(runs[0]), recipes(runs)]
    return [*plots, tables, samples(runs), prompt_answers(runs), recipes(runs)]


def _summary(run: RunData) -> Markup:
    """The run in a line: base model, storage, adapter, device, date."""
    manifest = run.manifest
    rank, alpha = string(manifest, "adapter", "rank"), facts.setup(run).get("alpha")
    words = (string(manifest, "adapter", "kind"), f"rank {rank}" if rank else "")
    adapter = " ".join(word for word in words if word)
    items = [
        string(manifest, "base", "name"),
        facts.stored_as(manifest).split(" (")[0],
        f"{adapter}, alpha {alpha}" if adapter and alpha else adapter,
        string(manifest, "machine", "device"),
        string(manifest, "created")[:16].replace("T", " "),
    ]
    first, *others = [item for item in items if item] or [""]
    return join([first, *(Markup(" &middot; " + text(item)) for item in others)])


def _footer(runs: Sequence[RunData]) -> Markup:
    versions = sorted({version for run in runs if (version := string(run.manifest, "qlora"))})
    written_by = f"Written by qlora {', '.join(versions)}".strip()
    return tag("footer", f"{written_by}. One file; it loads nothing from the network.")
