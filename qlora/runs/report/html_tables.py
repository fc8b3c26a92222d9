"""Tables: facts as rows with a column a run, the figures at the head of the page, and samples side by side."""

from collections.abc import Callable, Mapping, Sequence

from qlora.runs.report import facts

from qlora.runs.report import number_format
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.quantities import alike
from qlora.runs.report.run_data import RunData
from qlora.runs.report.settings import differing

LONGEST = 4000  # characters of a sample that are shown


def table(title: str, runs: Sequence[RunData], read: Callable[[RunData], facts.Facts]) -> Markup | None:
    """What `read` finds in each run: a row a fact, a column a run; None if it finds nothing."""
    columns = [read(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return _table(title, runs, {name: alike([column.get(name, "") for column in columns]) for name in names})


def different_settings(runs: Sequence[RunData]) -> Markup | None:
    """The settings in which the recipes of several runs differ."""
    rows = differing([run.recipe_text for run in runs]) if len(runs) > 1 else {}
    return _table("Settings that differ", runs, rows)


def head_figures(run: RunData) -> Markup | None:
    """The few numbers that are looked at first: what was learnt, how much of what, how long, how much memory."""
    found, curve = {name: str(value) for name, value in facts.result(run).items()}, facts.held_out(run)
    figures: list[tuple[object, str]] = []
    if "held-out loss before" in found and "held-out loss after" in found:
        figures.append(
            (_step(found["held-out loss before"], found["held-out loss after"]), f"held-out loss, {found['change']}")
        )
        before, after = (_perplexity(value) for value in (curve[0][1], curve[-1][1]))
        figures.append((_step(before, after), "held-out perplexity"))
    elif "training loss, last step" in found:
        figures.append((found["training loss, last step"], "training loss"))
    named = (("steps", "optimizer steps"), ("trained tokens", "trained tokens"), ("time", "from start to adapter"))
    figures += [(found[name], words) for name, words in named if name in found]
    if "peak memory, measured" in found:
        figures.append((found["peak memory, measured"], "peak memory, measured"))
    items = [tag("div", tag("dt", words), tag("dd", value)) for value, words in figures]
    return tag("dl", *items, class_="head") if items else None


def samples(runs: Sequence[RunData]) -> Markup | None:
    """Answers to the same prompts side by side: the reference, before training, after it (of each run)."""
    prompts = dict.fromkeys(str(sample.get("prompt", "")) for run in runs for sample in run.samples)
    shown = [_sample(prompt, runs) for prompt in prompts]
    return tag("section", tag("h2", "Samples"), *shown, class_="samples") if shown else None


def recipes(runs: Sequence[RunData]) -> Markup | None:
    """The recipe of each run as it was resolved."""
    written = [run for run in runs if run.recipe_text.strip()]
    if not written:
        return None
    blocks = [(tag("h3", run.name) if len(runs) > 1 else None, tag("pre", run.recipe_text.strip())) for run in written]
    return tag("section", tag("h2", "Recipe"), *(part for block in blocks for part in block), class_="recipe")


def _table(title: str, runs: Sequence[RunData], rows: Mapping[str, Sequence[str]]) -> Markup | None:
    if not rows:
        return None
    names = tag("thead", tag("tr", tag("td"), *(tag("th", run.name, scope="col") for run in runs)))
    body = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", value) for value in values))
        for name, values in rows.items()
    ]
    whole = tag("table", names if len(runs) > 1 else None, tag("tbody", *body))
    return tag("section", tag("h2", title), tag("div", whole, class_="scroll"), class_="facts")


def _sample(prompt: str, runs: Sequence[RunData]) -> Markup:
    answers = [(run, sample) for run in runs for sample in run.samples if str(sample.get("prompt", "")) == prompt]
    first = answers[0][1]
    reference = str(first.get("reference", ""))
    columns = [_answer("reference", reference, "")] if reference else []
    columns += [_answer("before", str(first["before"]), reference)] if "before" in first else []
    for run, sample in answers:
        name = "after" if len(runs) == 1 else f"after, {run.name}"
        columns += [_answer(name, str(sample["after"]), reference)] if "after" in sample else []
    return tag("article", tag("p", _cut(prompt), class_="prompt", dir="auto"), tag("div", *columns, class_="answers"))


def _answer(name: str, answer: str, reference: str) -> Markup:
    same = bool(reference) and name != "reference" and answer.strip() == reference.strip()
    head = tag("h4", name, tag("span", " equals the reference") if same else None)
    return tag("div", head, tag("p", _cut(answer), dir="auto"), class_="same" if same else None)


def _cut(words: str) -> str:
    more = len(words) - LONGEST
    return words if more <= 0 else f"{words[:LONGEST]} \u2026 ({number_format.count(more)} more characters)"


def _step(before: str, after: str) -> Markup:
    return tag("span", tag("small", before, " \u2192 "), after)


def _perplexity(loss: float) -> str:
    """E to the loss; a loss over 20 is far from any model and would only overflow."""
    return f"{2.718281828459045**loss:,.2f}" if loss < 20 else "over 1e8"
