"""`qlora train`: fine-tuning."""

from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log


@app.command(context_settings=WITH_OVERRIDES)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; key=value after it overrides its settings")],
) -> None:
    """Train a recipe: adapters on a frozen 4-bit base model; writes a folder with the adapter and a full record.

    Example: qlora train recipe.yaml adapter.rank=32 train.output=runs/rank32
    """
    from qlora.distributed.watchdog import report_once
    from qlora.recipe.check_paths import read_checked

    settings, notes = report_once(lambda: read_checked(recipe, context.args))
    from qlora.runs.train import train as train_recipe

    manifest = train_recipe(settings, notes)
    if manifest:
        result = manifest["result"]
        held_out = "" if result["eval_loss"] is None else f", held-out loss {result['eval_loss']:.4f}"
        log(f"done: {result['steps']} steps{held_out} -> {settings.train.output}")
