"""`qlora train`: the main job."""

from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, say


@app.command(context_settings=WITH_OVERRIDES)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; key=value after it overrides its settings")],
) -> None:
    """Train a recipe: a 4-bit base, adapters on it, and a folder that proves what happened.

    Example: qlora train recipe.yaml adapter.rank=32 train.output=runs/rank32
    """
    from qlora.distributed.watchdog import one_voice
    from qlora.recipe.recipe import read
    from qlora.runs.train import train as walk

    settings, notes = one_voice(lambda: read(recipe, context.args))
    manifest = walk(settings, notes)
    if manifest:
        result = manifest["result"]
        held_out = "" if result["eval_loss"] is None else f", held-out loss {result['eval_loss']:.4f}"
        say(f"done: {result['steps']} steps{held_out} -> {settings.train.output}")
