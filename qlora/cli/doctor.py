"""`qlora doctor`: what this machine can do."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False) -> None:
    """What works here and what does not, with the remedy for each, and a block to paste into an issue.

    Example: qlora doctor
    """
    from qlora.runs.doctor import as_lines, examine

    found = examine()
    if as_json:
        return answer(found)
    for line in as_lines(found):
        say(line)
    return None
