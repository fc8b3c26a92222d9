"""`qlora inspect`: rank and spectrum of an adapter's updates."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log, print_json


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="a run's folder, a checkpoint, an adapter folder")],
    rank_curve: Annotated[bool, typer.Option("--rank-curve", help="the error for each lower rank")] = False,
    picture: Annotated[str | None, typer.Option(metavar="FILE.svg", help="draw the spectrum by layer")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show rank and spectrum of each adapted matrix, and a verdict: too high, fits, saturated.

    Example: qlora inspect runs/example --picture spectrum.svg
    """
    from qlora.runs.find_run import find_adapter
    from qlora.utils.paths import require_writable_file

    find_adapter(run)
    if picture:
        require_writable_file(Path(picture), "--picture")
    from qlora.runs.inspect_adapter import inspect_adapter, table

    result = inspect_adapter(run, rank_curve, picture, log)
    if as_json:
        return print_json(result)
    log(table(result))
    return None
