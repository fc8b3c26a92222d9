"""`qlora report`: the page of one run, a comparison of several runs, or an index of all runs below a folder."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN [RUN ...] | FOLDER", help="folders of runs, finished or not")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="FILE", help="default: report.html in the run, ./comparison.html, or index.html in FOLDER"
        ),
    ] = None,
) -> None:
    """Write report.html of a run, or compare several runs on one page: losses, settings that differ, results.

    Of a folder with runs below it: one index page, whose table sorts and filters.

    Example: qlora report runs/rank16 runs/rank32 --out comparison.html
    """
    from qlora.runs.artifacts import PAGE
    from qlora.runs.compare import write_report_page
    from qlora.runs.run_index import INDEX, has_runs_below, write_index_page
    from qlora.utils.paths import require_writable_file

    if out:
        require_writable_file(Path(out), "--out")
    if len(runs) == 1 and has_runs_below(Path(runs[0])):
        index = write_index_page(Path(runs[0]), Path(out or Path(runs[0]) / INDEX))
        log(f"{len(index['runs'])} runs -> {index['path']} ({index['bytes'] / 1024:,.0f} KiB)")
        return
    target = out or (str(Path(runs[0]) / PAGE) if len(runs) == 1 else "comparison.html")
    result = write_report_page(runs, target)
    log(f"{', '.join(result['runs'])} -> {target} ({result['bytes'] / 1024:,.0f} KiB)")
