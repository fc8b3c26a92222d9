"""`qlora recipes`: the included recipes."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log

group = typer.Typer(no_args_is_help=True, help="List, show and copy the included recipes.")
app.add_typer(group, name="recipes")


@group.command(name="list")
def listing() -> None:
    """List the recipes, one line each.

    Example: qlora recipes list
    """
    from qlora.recipe.recipe import recipes_folder

    for file in sorted(recipes_folder().glob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{file.stem:32} {first.lstrip('# ') if first.startswith('#') else ''}")


@group.command()
def show(name: Annotated[str, typer.Argument(help="a name from `qlora recipes list`")]) -> None:
    """Print a recipe.

    Example: qlora recipes show 24gb-llama3.1-8b
    """
    typer.echo(_file(name).read_text(encoding="utf-8"), nl=False)


@group.command()
def copy(
    name: Annotated[str, typer.Argument(help="a name from `qlora recipes list`")],
    file: Annotated[str | None, typer.Argument(help="file to write; default: NAME.yaml in this folder")] = None,
) -> None:
    """Copy a recipe to edit it. An existing file is never overwritten.

    Example: qlora recipes copy 24gb-llama3.1-8b my.yaml
    """
    from qlora.utils.atomic_files import write_text
    from qlora.utils.paths import require_writable_file

    source = _file(name)
    target = require_writable_file(Path(file or source.name), new=True)
    write_text(target, source.read_text(encoding="utf-8"))
    log(f"{source.stem} -> {target}")


def _file(name: str) -> Path:
    from qlora.errors import InputError, did_you_mean
    from qlora.recipe.recipe import recipes_folder

    known = {file.stem: file for file in recipes_folder().glob("*.yaml")}
    stem = name.removesuffix(".yaml")
    if stem not in known:
        raise InputError(f"no recipe {name!r}.{did_you_mean(stem, known)}")
    return known[stem]
