"""`qlora check` and `qlora preview`: a recipe's settings, data and memory plan, before any weight is loaded."""

from dataclasses import asdict
from typing import Any

from qlora.data.prepare import prepare
from qlora.data.preview import preview
from qlora.errors import BaseModelError, QloraError
from qlora.model.lm_head import shares_prefixes
from qlora.recipe.check_model import Structure, check_packing, check_targets, structure_of
from qlora.recipe.dataset_profile import build_encoder, build_tokenizer
from qlora.recipe.findings import findings_from_error
from qlora.recipe.literature import suggest_rate
from qlora.recipe.matrix_rows import refuse_ids_without_row, refuse_long_documents, rows_with_new_tokens
from qlora.recipe.planning import Machine, Planner, disk_shortage
from qlora.recipe.recipe import Recipe
from qlora.recipe.recommendations import recommend_settings
from qlora.training.live_panel import progress_bar
from qlora.training.run_log import console
from qlora.training.schedule import count_steps


def preview_examples(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """The first `count` examples as they will be trained: where, input_ids, labels, segments, branches, answers."""
    objective = recipe.objective
    form = (objective.sided_format, objective.learns_prompts)
    return preview(recipe.data, build_encoder(recipe), count, recipe.train.seed, *form)


def check_contents(recipe: Recipe, result: dict[str, Any]) -> None:
    """Add data and memory to the object of `check --json`. An error in them is a problem in it, never an exception."""
    structures: list[Structure] = []
    for check in (_check_model, _check_data, _check_memory):
        try:
            check(recipe, result, structures)
        except QloraError as error:
            new = findings_from_error(error)
            result["problems"] += [finding for finding in new if finding not in result["problems"]]
    result["ok"] = not result["problems"]


def _check_model(recipe: Recipe, result: dict[str, Any], structures: list[Structure]) -> None:
    structures.append(structure_of(recipe))
    result["warnings"] += [{"where": "model", "message": note} for note in structures[0].notes]
    check_targets(recipe, structures[0])


def _check_data(recipe: Recipe, result: dict[str, Any], structures: list[Structure]) -> None:
    tokenizer = build_tokenizer(recipe)
    shares = all(shares_prefixes(structure.trial) for structure in structures)
    encoder, sided_format = build_encoder(recipe, tokenizer), recipe.objective.sided_format
    with progress_bar(console(), "data", lambda text: console().print(text, markup=False)) as progress:
        prepared = prepare(recipe.data, encoder, recipe.train.seed, progress, shares, sided_format)
    report = prepared.report
    result["problems"] += [asdict(finding) for finding in report.problems]
    result["warnings"] += [asdict(finding) for finding in report.warnings]
    result["data"] = {**report.counts(), "notes": [*report.notes, *_notes(recipe)], "summary": report.summary()}
    if not report.kept:
        return
    for structure in structures:  # none if the model can't be built, which is reported
        rows = rows_with_new_tokens(structure.rows, tokenizer, recipe.adapter.new_tokens)
        refuse_ids_without_row(prepared, tokenizer, rows)
        refuse_long_documents(prepared, structure.positions)
        check_packing(prepared, structure)
    steps = count_steps(recipe.train, report.packed_rows)
    advice = recommend_settings(recipe, report, steps, _trainable_parameters(recipe), suggest_rate(recipe))
    result["warnings"] += [{"where": key, "message": message} for key, message in advice]


def _notes(recipe: Recipe) -> list[str]:
    """What the counts of trained tokens leave out."""
    kind = recipe.objective.kind
    text = f"objective.kind {kind}: its cross entropy is over the prompts of chosen answers too; counted are answers"
    return [text] if recipe.objective.learns_prompts else []


def _trainable_parameters(recipe: Recipe) -> int | None:
    """The memory plan's count; None for a model whose shapes the planner does not know."""
    try:
        return int(Planner(recipe).plan(Machine.local()).as_json()["trainable_parameters"])
    except QloraError:
        return None


def _check_memory(recipe: Recipe, result: dict[str, Any], _: list[Structure]) -> None:
    try:
        plan = Planner(recipe).plan(Machine.local())
    except BaseModelError as error:  # training does without a plan
        message = f"no memory plan: {str(error).removeprefix('model: ')}"
        result["warnings"].append({"where": "memory", "message": message})
        return
    result["memory"] = plan.as_json()
    shortage = disk_shortage(recipe, plan)
    if shortage:
        result["warnings"].append({"where": "train.output", "message": shortage})
    if not plan.fits:
        result["problems"].append({"where": "memory", "message": plan.advice})
