"""`qlora report`: the page of one run, or a comparison of several runs."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN [RUN ...]", help="folders of runs, finished or not")],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="default: report.html in the run, or ./comparison.html"),
    ] = None,
) -> None:
    """Write report.html of a run, or compare several runs on one page: losses, settings that differ, results.

    Example: qlora report runs/rank16 runs/rank32 --out comparison.html
    """
    from qlora.runs.compare import write_report_page
    from qlora.utils.paths import require_writable_file

    if out:
        require_writable_file(Path(out), "--out")
    target = out or (str(Path(runs[0]) / "report.html") if len(runs) == 1 else "comparison.html")
    result = write_report_page(runs, target)
    log(f"{', '.join(result['runs'])} -> {target} ({result['bytes'] / 1024:,.0f} KiB)")
