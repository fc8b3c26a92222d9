"""`qlora combine`: one adapter out of several."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def combine(
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder that does not exist yet")],
    adapters: Annotated[list[str], typer.Argument(metavar="NAME=PATH[:WEIGHT]...", help="two adapters or more")],
    rank: Annotated[int | None, typer.Option(min=1, help="of the sum; default: all ranks together, exact")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Add adapters of one base: exactly, side by side, or the best approximation in a given rank.

    Example: qlora combine both polite=runs/polite brief=runs/brief:0.5
    """
    from qlora.exporters.resize_combine import combine
    from qlora.runs.adapter_names import parse_parts

    found = combine(out, parse_parts(adapters), rank, say)
    if as_json:
        return answer(found)
    say(f"-> {found['path']}")
    return None
