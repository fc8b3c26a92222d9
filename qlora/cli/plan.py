"""`qlora plan`: whether a recipe fits, and memory by component."""

from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log, print_json


@app.command(context_settings=WITH_OVERRIDES)
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="a recipe, or a model with the defaults")],
    gpu: Annotated[str | None, typer.Option(help="memory of one GPU, such as 24GiB; default: this machine's")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in the machine")] = 1,
    ram: Annotated[str | None, typer.Option(help="host memory, such as 64GiB; default: this machine's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Predict memory by component from config.json alone, and the settings that fit.

    Example: qlora plan recipe.yaml --gpu 24GiB
    """
    from qlora.recipe.plan_recipe import plan_recipe

    result, table = plan_recipe(recipe, context.args, gpu, gpus, ram)
    if as_json:
        print_json(result)
    else:
        log(table)
    if not result["fits"]:
        raise typer.Exit(3)
