"""`qlora plan`: will it fit, and what takes the room."""

from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, answer, app, say


@app.command(context_settings=WITH_OVERRIDES)
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="a recipe, or a model with the defaults")],
    gpu: Annotated[str | None, typer.Option(help="memory of one card, such as 24GiB; default: the card here")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="cards in this machine")] = 1,
    ram: Annotated[str | None, typer.Option(help="main memory, such as 64GiB; default: what is here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Bytes by owner from config.json alone, and the settings that fit.

    Example: qlora plan recipe.yaml --gpu 24GiB
    """
    from qlora.recipe.check import plan_recipe

    found, table = plan_recipe(recipe, context.args, gpu, gpus, ram)
    if as_json:
        answer(found)
    else:
        say(table)
    if not found["fits"]:
        raise typer.Exit(3)
