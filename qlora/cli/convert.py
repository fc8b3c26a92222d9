"""`qlora convert`: a recipe from another trainer's file."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a YAML file of Axolotl, TRL or LLaMA-Factory")],
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="file to write; default: stdout")] = None,
) -> None:
    """Convert an Axolotl, TRL or LLaMA-Factory file to a recipe, with a line for each key that was not converted.

    Example: qlora convert axolotl.yml recipe.yaml
    """
    from qlora.recipe.convert import convert as convert_file
    from qlora.utils.atomic_files import write_text
    from qlora.utils.paths import require_writable_file

    if out:
        require_writable_file(Path(out), new=True)
    result = convert_file(file)
    for line in result.notes:
        log(line)
    if result.no_setting_needed:
        log(f"no setting needed: {'; '.join(result.no_setting_needed)}")
    for line in result.not_converted:
        log(f"not converted: {line}")
    if out:
        write_text(Path(out), result.text)
        log(f"{result.tool}'s {file} -> {out}. Next: qlora check {out}")
    else:
        typer.echo(result.text, nl=False)
