"""`qlora preview`: rows as they will be trained."""

import sys
from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, answer, app, say


@app.command(context_settings=WITH_OVERRIDES)
def preview(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; key=value after it overrides its settings")],
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="how many rows to show")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show rows as they will be trained, the trained tokens marked.

    Example: qlora preview recipe.yaml -n 5
    """
    from qlora.recipe.check import preview_rows
    from qlora.recipe.recipe import read

    settings, notes = read(recipe, context.args)
    found = preview_rows(settings, rows)
    if as_json:
        return answer({"rows": found})
    for note in notes:
        say(note)
    for row in found:
        typer.secho(row["where"], bold=True, err=True)
        for segment in row["segments"]:
            _show(segment["text"], segment["trained"])
        say("\n")
    if not found:
        say("no usable row: `qlora check` says why")
    return None


def _show(text: str, trained: bool) -> None:
    """A stretch of a row; what is trained is green on a terminal and in double brackets in a pipe."""
    if sys.stderr.isatty():
        typer.secho(text, fg=typer.colors.GREEN if trained else None, underline=trained, nl=False, err=True)
    else:
        typer.echo(f"[[{text}]]" if trained else text, nl=False, err=True)
