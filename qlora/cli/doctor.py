"""`qlora doctor`: the capabilities and problems of this machine."""

from typing import Annotated

import typer

from qlora.cli.app import app, log, print_json


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False) -> None:
    """List what works on this machine, what does not with its remedy, and a block to paste into an issue.

    Every device proves an NF4 round trip and training steps in its dtypes; exit code 1 if one computes wrong.

    Example: qlora doctor
    """
    from qlora.runs.doctor import computes, examine_machine, report_lines

    result = examine_machine()
    if as_json:
        print_json(result)
    else:
        for line in report_lines(result):
            log(line)
    if not computes(result):
        raise typer.Exit(1)
