"""`qlora push`: an adapter or a model to the Hugging Face hub."""

from typing import Annotated

import typer

from qlora.cli.app import app, log, print_json


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="a finished run, or the folder of an export")],
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="created if it does not exist")],
    public: Annotated[bool, typer.Option("--public", help="readable by everyone; default: private")] = False,
    base: Annotated[str | None, typer.Option(help="hub name of the base model, if the recipe names a folder")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Upload an adapter or a model to the hub, private unless --public. No other command uploads anything.

    Example: qlora push runs/example me/my-adapter
    """
    from qlora.exporters.push import push

    result = push(folder, repository, public, base, log)
    if as_json:
        return print_json(result)
    log(f"-> {result['url']}")
    return None
