"""`qlora check` and `qlora preview`: a recipe's settings, data and memory plan, before any weight is loaded."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qlora.data.prepare import prepare
from qlora.data.preview import preview
from qlora.errors import QloraError
from qlora.recipe.dataset_profile import build_encoder
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe, read
from qlora.recipe.recommendations import recommend_settings
from qlora.training.run_log import console
from qlora.training.schedule import count_steps
from qlora.utils.progress import ProgressReporter

LOCATION = re.compile(r"(?P<where>(?:[^\s:]+:\d+|[\w./\\-]+)): (?P<message>.+)", re.DOTALL)
LINE_NUMBER = re.compile(r":\d+$")  # the end of a record's location
SHOWN = 5  # findings of a kind that are printed
Finding = dict[str, str]


def preview_examples(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """The first `count` examples as they will be trained: where, input_ids, labels, segments."""
    return preview(recipe.data, build_encoder(recipe), count, recipe.train.seed)


def check_recipe(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The object of `check --json`. An error in the recipe or the data is a problem in it, never an exception."""
    result: dict[str, Any] = {"ok": False, "problems": [], "warnings": [], "data": None, "memory": None}
    try:
        recipe, notes = read(path, overrides)
    except QloraError as error:
        result["problems"] = findings_from_error(error)
        return result
    result["warnings"] = [{"where": "recipe", "message": note} for note in notes]
    for check in (_check_data, _check_memory):
        try:
            check(recipe, result)
        except QloraError as error:
            result["problems"] += findings_from_error(error)
    result["ok"] = not result["problems"]
    return result


def summarize_findings(findings: Sequence[Finding]) -> list[str]:
    """Findings as lines: of each kind the first few, with a count of the rest; of overlong examples the longest."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kind = finding["message"].split(":")[0]
        kinds.setdefault(kind if LINE_NUMBER.search(finding["where"]) else f"{finding}", []).append(finding)
    lines = []
    for kind, group in kinds.items():
        ordered = sorted(group, key=_tokens, reverse=True) if kind in ("dropped, overlong", "truncated") else group
        lines += [f"{finding['where']}: {finding['message']}" for finding in ordered[:SHOWN]]
        if len(group) > SHOWN:
            lines.append(f"{kind}: {len(group) - SHOWN:,} more records; `qlora check --json` lists all")
    return lines


def _tokens(finding: Finding) -> int:
    match = re.search(r": (\d+) tokens", finding["message"])
    return int(match[1]) if match else 0


def findings_from_error(error: QloraError) -> list[Finding]:
    """The lines of an error as locations and messages."""
    lines = str(error).splitlines()
    matches = [LOCATION.fullmatch(line) for line in lines]
    return [
        {"where": match["where"], "message": match["message"]} if match else {"where": "", "message": line}
        for match, line in zip(matches, lines, strict=True)
    ]


def _check_data(recipe: Recipe, result: dict[str, Any]) -> None:
    progress = ProgressReporter(lambda text: console().print(text, markup=False), "data")
    report = prepare(recipe.data, build_encoder(recipe), recipe.train.seed, progress).report
    result["problems"] += [asdict(finding) for finding in report.problems]
    result["warnings"] += [asdict(finding) for finding in report.warnings]
    result["data"] = {**report.counts(), "notes": list(report.notes), "summary": report.summary()}
    if not report.kept:
        return
    steps = count_steps(recipe.train, report.packed_rows)
    advice = recommend_settings(recipe, report, steps, _trainable_parameters(recipe))
    result["warnings"] += [{"where": key, "message": message} for key, message in advice]


def _trainable_parameters(recipe: Recipe) -> int | None:
    """The memory plan's count; None for a model whose shapes the planner does not know."""
    try:
        return int(Planner(recipe).plan(Machine.local()).as_json()["trainable_parameters"])
    except QloraError:
        return None


def _check_memory(recipe: Recipe, result: dict[str, Any]) -> None:
    plan = Planner(recipe).plan(Machine.local())
    result["memory"] = plan.as_json()
    if not plan.fits:
        result["problems"].append({"where": "memory", "message": plan.advice})
