"""`qlora resize`: the same adapter in a lower rank."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="a run's folder, a checkpoint, an adapter folder")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder that does not exist yet")],
    rank: Annotated[int, typer.Option(min=1, help="the new rank, lower than the adapter's")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Truncate an adapter to a lower rank, by the singular values of its updates, and state the energy lost.

    Example: qlora resize runs/example small --rank 4
    """
    from qlora.exporters.resize_combine import resize

    found = resize(adapter, out, rank, say)
    if as_json:
        return answer(found)
    say(f"-> {found['path']}")
    return None
