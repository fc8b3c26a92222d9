"""Tables of a report: facts with a column per run, the figures at the head of the page, and samples side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qlora.config import parse, write
from qlora.errors import RecipeError
from qlora.runs.report import facts, number_format
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.quantities import in_one_unit
from qlora.runs.report.run_data import RunData

MAX_SAMPLE = 4000  # characters of a sample that are shown


def table(title: str, runs: Sequence[RunData], read: Callable[[RunData], facts.Facts]) -> Markup | None:
    """The facts that `read` returns for each run: a row per fact, a column per run; None without facts."""
    columns = [read(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return _table(title, runs, {name: in_one_unit([column.get(name, "") for column in columns]) for name in names})


def different_settings(runs: Sequence[RunData]) -> Markup | None:
    """The settings that are not the same in all recipes, with the value in each (empty where it is not set)."""
    recipes = [flat_settings(run.recipe_text) for run in runs] if len(runs) > 1 else []
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = {key: [recipe.get(key, "") for recipe in recipes] for key in keys}
    return _table("Settings that differ", runs, {key: values for key, values in rows.items() if len(set(values)) > 1})


def flat_settings(recipe_text: str) -> dict[str, str]:
    """Dotted key -> value as text; list items are numbered: data.train.0.path. Empty for an invalid recipe."""
    try:
        return dict(_flatten("", parse(recipe_text, "recipe").value))
    except RecipeError:
        return {}


def _flatten(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Mappings and lists of mappings are flattened; a list of plain values is one value."""
    nested = isinstance(value, Mapping) or (
        isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    )
    if nested and value:
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flatten(f"{key}.{name}" if key else str(name), item)
    elif key:
        written = value if isinstance(value, str) else write({"value": value}).partition(":")[2]
        yield key, " ".join(written.split())


def head_figures(run: RunData) -> Markup | None:
    """The most important figures: losses, steps, tokens, time, memory."""
    values, curve = {name: str(value) for name, value in facts.result(run).items()}, facts.held_out_losses(run)
    figures: list[tuple[object, str]] = []
    if "held-out loss before" in values and "held-out loss after" in values:
        losses = _before_after(values["held-out loss before"], values["held-out loss after"])
        figures.append((losses, f"held-out loss, {values['change']}"))
        before, after = (_perplexity(value) for value in (curve[0][1], curve[-1][1]))
        figures.append((_before_after(before, after), "held-out perplexity"))
    elif "training loss, last step" in values:
        figures.append((values["training loss, last step"], "training loss"))
    labels = (("steps", "optimizer steps"), ("trained tokens", "trained tokens"), ("time", "from start to adapter"))
    figures += [(values[name], label) for name, label in labels if name in values]
    if "peak memory, measured" in values:
        figures.append((values["peak memory, measured"], "peak memory, measured"))
    items = [tag("div", tag("dt", label), tag("dd", value)) for value, label in figures]
    return tag("dl", *items, class_="head") if items else None


def samples(runs: Sequence[RunData]) -> Markup | None:
    """Answers to the same prompts side by side: the reference, before training, after training of each run."""
    prompts = dict.fromkeys(str(sample.get("prompt", "")) for run in runs for sample in run.samples)
    articles = [_sample(prompt, runs) for prompt in prompts]
    return tag("section", tag("h2", "Samples"), *articles, class_="samples") if articles else None


def recipes(runs: Sequence[RunData]) -> Markup | None:
    """The resolved recipe of each run."""
    with_recipe = [run for run in runs if run.recipe_text.strip()]
    if not with_recipe:
        return None
    elements: list[Markup] = []
    for run in with_recipe:
        elements += [tag("h3", run.name)] if len(runs) > 1 else []
        elements.append(tag("pre", run.recipe_text.strip()))
    return tag("section", tag("h2", "Recipe"), *elements, class_="recipe")


def _table(title: str, runs: Sequence[RunData], rows: Mapping[str, Sequence[str]]) -> Markup | None:
    if not rows:
        return None
    names = tag("thead", tag("tr", tag("td"), *(tag("th", run.name, scope="col") for run in runs)))
    body = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", value.replace(" %", "\u00a0%")) for value in values))
        for name, values in rows.items()
    ]
    content = tag("table", names if len(runs) > 1 else None, tag("tbody", *body))
    return tag("section", tag("h2", title), tag("div", content, class_="scroll"), class_="facts")


def _sample(prompt: str, runs: Sequence[RunData]) -> Markup:
    answers = [(run, sample) for run in runs for sample in run.samples if str(sample.get("prompt", "")) == prompt]
    first = answers[0][1]
    reference = str(first.get("reference", ""))
    columns = [answer_column("reference", reference, "")] if reference else []
    columns += [answer_column("before", str(first["before"]), reference)] if "before" in first else []
    for run, sample in answers:
        name = "after" if len(runs) == 1 else f"after, {run.name}"
        columns += [answer_column(name, str(sample["after"]), reference)] if "after" in sample else []
    return sample_article(prompt, columns)


def sample_article(prompt: str, columns: Sequence[Markup]) -> Markup:
    """A prompt, and answers to it side by side."""
    shown = tag("p", _shorten(prompt), class_="prompt", dir="auto")
    return tag("article", shown, tag("div", *columns, class_="answers"))


def answer_column(name: str, answer: str, reference: str = "") -> Markup:
    """One of the answers to a prompt."""
    same = bool(reference) and name != "reference" and answer.strip() == reference.strip()
    head = tag("h4", name, tag("span", " equals the reference") if same else None)
    return tag("div", head, tag("p", _shorten(answer), dir="auto"), class_="same" if same else None)


def _shorten(text: str) -> str:
    more = len(text) - MAX_SAMPLE
    return text if more <= 0 else f"{text[:MAX_SAMPLE]} \u2026 ({number_format.count(more)} more characters)"


def _before_after(before: str, after: str) -> Markup:
    return tag("span", tag("small", before, " \u2192 "), after)


def _perplexity(loss: float) -> str:
    """E to the loss; a loss above 20 would only give a very large number."""
    return f"{2.718281828459045**loss:,.2f}" if loss < 20 else "over 1e8"
