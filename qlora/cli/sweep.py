"""`qlora sweep`: several variants of a recipe at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, answer, app, say

if TYPE_CHECKING:
    from qlora.runs.sweep.variants import Variant


@app.command(context_settings=WITH_OVERRIDES)
def sweep(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; after it key=value for all, key=a,b,c to sweep")],
    variants: Annotated[
        str | None, typer.Option(metavar="FILE.yaml", help="named variants, each `name: {key: value, ...}`")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="folder of the runs' folders; default: train.output")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="only the memory that all take together")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Train several variants of a recipe at once, on one base that is loaded and held once.

    A comma list sweeps a setting, several lists make a grid; commas in brackets or quotes are part of a value. Each
    variant steps in turn and leaves in DIR/NAME what `qlora train` of its recipe leaves; on a CPU, bit for bit. Started
    again, it keeps what is finished and resumes the rest.

    --json answers {output, best, seconds, planned_bytes, peak_bytes, page, notes, variants: [{name, output, settings,
    steps, loss, eval_loss, trainable_parameters, seconds, kept, error}]}; with --plan what `qlora plan` answers, and
    {alone_bytes, variants: [{name, trainable_parameters, peak_bytes, alone_bytes, fits}]}.

    Example: qlora sweep recipe.yaml adapter.rank=8,16,32 optim.learning_rate=1e-4,2e-4 --out runs/ranks
    """
    from pathlib import Path

    from qlora.runs.sweep.variants import variants_of

    found = variants_of(recipe, context.args, variants, out)
    if plan:
        return _plan(found, as_json)
    from qlora.runs.sweep.train_together import train_together

    outcome = train_together(found, Path(found[0].recipe.train.output).parent)
    say(outcome.table())
    if as_json:
        answer(outcome.found)
    outcome.refuse_failures()
    said = outcome.found
    say(f"done: {len(found)} variants, best {said['best'] or 'not known'} -> {said['output']}")
    return None


def _plan(variants: "Sequence[Variant]", as_json: bool) -> None:
    """The memory of all at once; exit code 3 if it is not there."""
    from qlora.recipe.planning import here
    from qlora.runs.sweep.sweep_plan import plan_sweep, table

    found = plan_sweep({variant.name: variant.recipe for variant in variants}, here())
    if as_json:
        answer(found.as_json())
    else:
        say(table(found))
    if not found.most.fits:
        raise typer.Exit(3)
