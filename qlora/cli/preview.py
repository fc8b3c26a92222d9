"""`qlora preview`: examples as they will be trained."""

import sys
from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log, print_json


@app.command(context_settings=WITH_OVERRIDES)
def preview(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; key=value after it overrides its settings")],
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="number of examples to show")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show examples as they will be trained, the trained tokens marked.

    Example: qlora preview recipe.yaml -n 5
    """
    from qlora.recipe.check_paths import ENCODING, read_checked

    settings, notes = read_checked(recipe, context.args, ENCODING)
    from qlora.recipe.check import preview_examples

    examples = preview_examples(settings, rows)
    if as_json:
        return print_json({"rows": examples})
    for note in notes:
        log(note)
    for example in examples:
        typer.secho(example["where"], bold=True, err=True)
        branch = 0
        for segment in example["segments"]:
            if segment["branch"] != branch:
                branch = segment["branch"]
                _show_branch(branch, *example["branches"][branch - 1])
            _show(segment["text"], segment["trained"], segment["thought"])
        log("\n")
    if not examples:
        log("no record can be trained on: `qlora check` shows the reasons")
    return None


def _show_branch(number: int, start: int, parent: int) -> None:
    """Print where a branch of a tree begins."""
    shared = f"follows the first {parent + 1:,} tokens" if parent >= 0 else "follows no token"
    typer.secho(f"\nbranch {number} (token {start:,}) {shared}:", dim=True, err=True)


def _show(text: str, trained: bool, thought: bool) -> None:
    """Print a segment; trained ones are green on a terminal, thoughts blue, and both in double brackets in a pipe."""
    if sys.stderr.isatty():
        color = (typer.colors.BLUE if thought else typer.colors.GREEN) if trained else None
        typer.secho(text, fg=color, underline=trained, nl=False, err=True)
    else:
        typer.echo(f"[[{text}]]" if trained else text, nl=False, err=True)
