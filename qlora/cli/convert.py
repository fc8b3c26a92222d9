"""`qlora convert`: another trainer's file as a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, say


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a YAML file of Axolotl, TRL or LLaMA-Factory")],
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="where to; default: stdout")] = None,
) -> None:
    """Turn an Axolotl, TRL or LLaMA-Factory file into a recipe, with a line for what could not be carried over.

    Example: qlora convert axolotl.yml recipe.yaml
    """
    from qlora.errors import InputError
    from qlora.recipe.convert import convert as converted
    from qlora.utils.atomic_files import write_text

    if out and Path(out).exists():
        raise InputError(f"{out} is there already. Name another file.")
    found = converted(file)
    for line in found.notes:
        say(line)
    if found.anyway:
        say(f"need no carrying: {'; '.join(found.anyway)}")
    for line in found.left:
        say(f"not carried over: {line}")
    if out:
        write_text(Path(out), found.text)
        say(f"{found.tool}'s {file} -> {out}. Next: qlora check {out}")
    else:
        typer.echo(found.text, nl=False)
