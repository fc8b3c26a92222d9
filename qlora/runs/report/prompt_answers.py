"""Answers to train.sample_prompts on a page: for each prompt the base's, then those of the evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.runs.report.html_tables import answer_column, sample_article
from qlora.runs.report.markup import Markup, tag
from qlora.runs.report.run_data import RunData

MAX_EVALUATIONS = 5  # evenly over the run, the last one included


def prompt_answers(runs: Sequence[RunData]) -> Markup | None:
    """A section with an article for each prompt of each run; None without answers."""
    articles = [article for run in runs for article in _articles(run, len(runs) > 1)]
    return tag("section", tag("h2", "Answers during training"), *articles, class_="samples") if articles else None


def _articles(run: RunData, named: bool) -> list[Markup]:
    lines = [line for line in run.metrics if line.get("event") == "eval" and isinstance(line.get("answers"), list)]
    columns: dict[str, list[Markup]] = {}
    for line in lines:
        for answer in (item for item in line["answers"] if isinstance(item, Mapping) and "base" in item):
            columns.setdefault(str(answer.get("prompt")), []).append(answer_column("base", str(answer["base"])))
    for line in _evenly(lines):
        name = f"step {line.get('step')}" + (f", {run.name}" if named else "")
        for answer in (item for item in line["answers"] if isinstance(item, Mapping)):
            column = answer_column(name, str(answer.get("answer", "")))
            columns.setdefault(str(answer.get("prompt")), []).append(column)
    return [sample_article(prompt, answers) for prompt, answers in columns.items()]


def _evenly(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most MAX_EVALUATIONS of the lines, the first and the last included."""
    gaps = min(len(lines), MAX_EVALUATIONS) - 1
    return [lines[round(index * (len(lines) - 1) / max(1, gaps))] for index in range(gaps + 1)]
