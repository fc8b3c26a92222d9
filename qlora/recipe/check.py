"""A recipe looked at before any weight is loaded: checked, planned, previewed."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.errors import QloraError
from qlora.memory.planner.memory_plan import Plan, gib, in_words
from qlora.recipe.planning import Machine, better, elsewhere, here, plan_of, plans_of
from qlora.recipe.recipe import Recipe, from_mapping, read
from qlora.utils.progress import ProgressReporter

PLACE = re.compile(r"(?P<where>(?:[^\s:]+:\d+|[\w./\\-]+)): (?P<message>.+)", re.DOTALL)
ROW = re.compile(r":\d+$")  # the end of a row's place
SHOWN = 5  # findings of a kind that people are shown
Finding = dict[str, str]


def preview_rows(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """The first `count` rows as they will be trained: where, input_ids, labels, segments."""
    from qlora.data.preview import preview
    from qlora.recipe.dataset_profile import encoder_of

    return preview(recipe.data, encoder_of(recipe), count, recipe.train.seed)


def check_recipe(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything that can be known without weights; a mistake is a problem in the answer, never an exception."""
    found: dict[str, Any] = {"ok": False, "problems": [], "warnings": [], "data": None, "memory": None}
    try:
        recipe, notes = read(path, overrides)
    except QloraError as error:
        found["problems"] = findings_of(error)
        return found
    found["warnings"] = [{"where": "recipe", "message": note} for note in notes]
    for part in (_check_data, _check_memory):
        try:
            part(recipe, found)
        except QloraError as error:
            found["problems"] += findings_of(error)
    found["ok"] = not found["problems"]
    return found


def shortened(findings: Sequence[Finding]) -> list[str]:
    """Findings as lines, of many that say the same of a row only the first few; the longest rows of those too long."""
    alike: dict[str, list[Finding]] = {}
    for finding in findings:
        kind = finding["message"].split(":")[0]
        alike.setdefault(kind if ROW.search(finding["where"]) else f"{finding}", []).append(finding)
    lines = []
    for kind, group in alike.items():
        worst = sorted(group, key=_tokens, reverse=True) if kind in ("dropped, overlong", "truncated") else group
        lines += [f"{finding['where']}: {finding['message']}" for finding in worst[:SHOWN]]
        if len(group) > SHOWN:
            lines.append(f"{kind}: {len(group) - SHOWN:,} more rows; `qlora check --json` names each")
    return lines


def _tokens(finding: Finding) -> int:
    counts = re.search(r": (\d+) tokens", finding["message"])
    return int(counts[1]) if counts else 0


def findings_of(error: QloraError) -> list[Finding]:
    """An error's lines as places and messages."""
    matched = [PLACE.fullmatch(line) for line in str(error).splitlines()]
    lines = str(error).splitlines()
    return [
        {"where": match["where"], "message": match["message"]} if match else {"where": "", "message": line}
        for match, line in zip(matched, lines, strict=True)
    ]


def _check_data(recipe: Recipe, found: dict[str, Any]) -> None:
    from qlora.data.prepare import prepare
    from qlora.recipe.dataset_profile import encoder_of
    from qlora.recipe.recommendations import recommendations
    from qlora.training.loop import steps_of
    from qlora.training.run_log import console

    progress = ProgressReporter(lambda text: console().print(text, markup=False), "data")
    report = prepare(recipe.data, encoder_of(recipe), recipe.train.seed, progress).report
    found["problems"] += [asdict(finding) for finding in report.problems]
    found["warnings"] += [asdict(finding) for finding in report.warnings]
    found["data"] = {**report.counts(), "notes": list(report.notes), "summary": report.summary()}
    steps = steps_of(recipe.train, report.packed_rows)
    told = recommendations(recipe, report, steps, _trainable_parameters(recipe)) if report.kept else ()
    found["warnings"] += [{"where": key, "message": message} for key, message in told]


def _trainable_parameters(recipe: Recipe) -> int | None:
    """As the memory plan counts them; None for a model whose shapes it does not know."""
    try:
        return int(plan_of(recipe, here()).as_json()["trainable_parameters"])
    except QloraError:
        return None


def _check_memory(recipe: Recipe, found: dict[str, Any]) -> None:
    plan = plan_of(recipe, here())
    found["memory"] = plan.as_json()
    if not plan.fits:
        found["problems"].append({"where": "memory", "message": plan.advice})


def plan_recipe(
    name: str, overrides: Sequence[str], gpu: str | None, gpus: int, ram: str | None
) -> tuple[dict[str, Any], str]:
    """The plan of a recipe, or of a model under the defaults: as `plan --json` answers it, and as a table."""
    recipe = recipe_or_model(name, overrides)
    plans = plans_of(recipe, machine_of(gpu, gpus, ram))
    plan = plans[better(plans)]
    each = {kind: {"peak_bytes": found.peak_bytes, "fits": found.fits} for kind, found in plans.items()}
    ways = [f"{kind}: {_a_card(found)}" for kind, found in plans.items()] if len(plans) > 1 else []
    return plan.as_json() | {"strategies": each}, "\n".join([str(plan), *ways])


def _a_card(plan: Plan) -> str:
    """One way to share the cards, in a line."""
    fits = "" if plan.fits else ", does not fit"
    return f"{gib(plan.peak_bytes).strip()} of each card{fits}; {in_words(plan)}"


def recipe_or_model(name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe in a file, or the defaults around a model. RecipeError, BaseModelError."""
    path = Path(name)
    if name.endswith((".yaml", ".yml")) or (path.is_file() and path.name != "config.json"):
        return read(name, overrides)[0]
    return from_mapping({"model": name, "data": {"train": "-"}}, "defaults", overrides)[0]


def machine_of(gpu: str | None, gpus: int, ram: str | None) -> Machine:
    """The machine that sizes such as 24GiB describe; where one is not said, the one here."""
    if gpu:
        return elsewhere(gpu, gpus, ram)
    local = here(gpus)
    return local if not ram else Machine(local.card_bytes, gpus, elsewhere(ram, 1, None).card_bytes)
