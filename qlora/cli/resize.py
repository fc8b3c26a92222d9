"""`qlora resize`: an adapter truncated to a lower rank."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log, print_json


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="a run's folder, a checkpoint, an adapter folder")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder that does not exist yet")],
    rank: Annotated[int, typer.Option(min=1, help="the new rank, lower than the adapter's")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Truncate an adapter to a lower rank by SVD of its updates, and print the energy lost.

    Example: qlora resize runs/example small --rank 4
    """
    from qlora.runs.find_run import find_adapter
    from qlora.utils.atomic_folders import require_new_folder

    find_adapter(adapter)
    require_new_folder(Path(out))
    from qlora.exporters.resize_combine import resize

    result = resize(adapter, out, rank, log)
    if as_json:
        return print_json(result)
    log(f"-> {result['path']}")
    return None
