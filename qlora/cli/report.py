"""`qlora report`: the page of one run drawn anew, or several runs compared."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, say


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN [RUN ...]", help="folders of runs, also of running ones")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="default: report.html in the run; comparison.html here")
    ] = None,
) -> None:
    """Draw report.html of a run anew, or two and more runs over each other: losses, settings that differ, results.

    Example: qlora report runs/rank16 runs/rank32 --out comparison.html
    """
    from qlora.runs.compare import draw

    target = out or (str(Path(runs[0]) / "report.html") if len(runs) == 1 else "comparison.html")
    found = draw(runs, target)
    say(f"{', '.join(found['runs'])} -> {target} ({found['bytes'] / 1024:,.0f} KiB)")
