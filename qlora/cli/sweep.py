"""`qlora sweep`: training of several variants of a recipe at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log, print_json

if TYPE_CHECKING:
    from qlora.runs.sweep.variants import Variant


@app.command(context_settings=WITH_OVERRIDES)
def sweep(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; after it key=value for all, key=a,b,c to sweep")],
    variants: Annotated[str | None, typer.Option(metavar="FILE", help="YAML lines `name: {key: value, ...}`")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="of the runs' folders; default: train.output")] = None,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="measure the learning rate: range, refinement")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="only predict the memory of all variants together")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Train several variants of a recipe at once, on one base model that is loaded once.

    A comma list sweeps a setting, several lists make a grid; commas in brackets or quotes are part of a value. The
    variants step in turn. Each writes to DIR/NAME what `qlora train` of its recipe writes, on a CPU bit for bit. The
    same command again keeps finished variants and resumes the others.

    --find-lr writes DIR/recipe.yaml with the rate that has the lowest held-out loss, the reason, and the curve on the
    page; --json has them as find_lr: {rate, reason, suggested, source, recipe, curve: [{stage, rate, eval_loss, ...}]}.

    --json prints {output, best, seconds, planned_bytes, peak_bytes, page, notes, variants: [{name, output, settings,
    steps, loss, eval_loss, trainable_parameters, seconds, kept, error}]}; with --plan the keys of `qlora plan`, and
    {alone_bytes, variants: [{name, trainable_parameters, peak_bytes, alone_bytes, fits}]}.

    Example: qlora sweep recipe.yaml adapter.rank=8,16,32 optim.learning_rate=1e-4,2e-4 --out runs/ranks
    """
    from qlora.runs.sweep.variants import rate_variants, variants_of

    read = rate_variants if find_lr else variants_of
    runs = read(recipe, context.args, variants, out)
    _check(runs, None if plan else out, plan)
    if plan:
        _plan(runs, as_json)
    else:
        _train(runs, as_json, find_lr)


def _check(variants: "Sequence[Variant]", out: str | None, plan: bool) -> None:
    """InputError for a path that can't be used, before anything heavy is imported."""
    from qlora.recipe.check_paths import ENCODING, require_paths, require_shared_paths
    from qlora.utils.paths import require_writable_folder

    if out:
        require_writable_folder(Path(out), "--out")
    require_paths(variants[0].recipe, () if plan else ("train.output",))
    require_shared_paths((variant.recipe for variant in variants), ("model.name",) if plan else ENCODING)


def _train(variants: "Sequence[Variant]", as_json: bool, find_lr: bool) -> None:
    """Train all variants; print a table, or the JSON object."""
    from qlora.runs.sweep.train_together import train_together

    folder = Path(variants[0].recipe.train.output).parent
    if find_lr:
        from qlora.runs.sweep.find_rate import RateSearch

        result = train_together(variants, folder, rounds=lambda recipe: RateSearch(recipe, folder))
    else:
        result = train_together(variants, folder)
    log(result.table())
    if as_json:
        print_json(result.summary)
    result.refuse_failures()
    if find_lr:
        return log(f"done: -> {result.summary['find_lr']['recipe']}")
    best = result.summary["best"] or "not known"
    log(f"done: {len(variants)} variants, best {best} -> {result.summary['output']}")


def _plan(variants: "Sequence[Variant]", as_json: bool) -> None:
    """Print the memory plan of all variants together; exit code 3 if it does not fit."""
    from qlora.recipe.planning import Machine
    from qlora.runs.sweep.sweep_plan import format_plan, plan_sweep

    sweep_plan = plan_sweep({variant.name: variant.recipe for variant in variants}, Machine.local())
    if as_json:
        print_json(sweep_plan.as_json())
    else:
        log(format_plan(sweep_plan))
    if not sweep_plan.largest.fits:
        raise typer.Exit(3)
