"""`qlora inspect`: was the rank right, and what do the updates look like."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="a run's folder, a checkpoint, an adapter folder")],
    rank_curve: Annotated[bool, typer.Option("--rank-curve", help="how the error falls with the rank")] = False,
    picture: Annotated[str | None, typer.Option(metavar="FILE.svg", help="draw the spectrum by layer")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Rank and spectrum of each adapted matrix, and what it suggests: too high, fits, saturated.

    Example: qlora inspect runs/example --picture spectrum.svg
    """
    from qlora.runs.inspect_adapter import inspect_adapter, table

    found = inspect_adapter(run, rank_curve, picture, say)
    if as_json:
        return answer(found)
    say(table(found))
    return None
