"""`qlora combine`: one adapter out of several."""

from typing import Annotated

import typer

from qlora.cli.app import app, log, print_json


@app.command()
def combine(
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder that does not exist yet")],
    adapters: Annotated[list[str], typer.Argument(metavar="NAME=PATH[:WEIGHT]...", help="two adapters or more")],
    rank: Annotated[int | None, typer.Option(min=1, help="of the result; default: the sum of the ranks")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Add adapters of one base model: exactly, with their ranks added, or approximated in a given rank.

    Example: qlora combine both polite=runs/polite brief=runs/brief:0.5
    """
    from qlora.exporters.resize_combine import combine
    from qlora.runs.adapter_names import parse_weighted_adapters

    result = combine(out, parse_weighted_adapters(adapters), rank, log)
    if as_json:
        return print_json(result)
    log(f"-> {result['path']}")
    return None
