"""`qlora check`: everything that can be known about a recipe without loading weights."""

from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, answer, app, say


@app.command(context_settings=WITH_OVERRIDES)
def check(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; key=value after it overrides its settings")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Check a recipe: schema, files, labels and memory, without loading weights.

    Example: qlora check recipe.yaml
    """
    from qlora.recipe.check import check_recipe, shortened
    from qlora.utils.redact import redacted_values

    found = check_recipe(recipe, context.args)
    if as_json:
        answer(redacted_values(found))  # findings quote rows
    else:
        for line in (*found["data"]["notes"], *found["data"]["summary"]) if found["data"] else ():
            say(line)
        for kind in ("warnings", "problems"):
            for line in shortened(found[kind]):
                say(f"{kind[:-1]}: {line}")
        say("ok" if found["ok"] else "not ok: the problems above stop a run")
    if not found["ok"]:
        raise typer.Exit(3 if [problem["where"] for problem in found["problems"]] == ["memory"] else 2)
