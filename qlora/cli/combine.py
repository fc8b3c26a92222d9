"""`qlora combine`: one adapter out of several."""

from pathlib import Path
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
    from qlora.runs.adapter_names import parse_weighted_adapters
    from qlora.runs.find_run import find_adapter
    from qlora.utils.atomic_folders import require_new_folder

    terms = parse_weighted_adapters(adapters)
    for term in terms:
        find_adapter(term.path)
    require_new_folder(Path(out))
    from qlora.exporters.resize_combine import combine

    result = combine(out, terms, rank, log)
    if as_json:
        return print_json(result)
    log(f"-> {result['path']}")
    return None
