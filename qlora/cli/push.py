"""`qlora push`: an adapter or a model to the Hugging Face hub."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="a finished run, or the folder of an export")],
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="made if it is not there")],
    public: Annotated[bool, typer.Option("--public", help="everybody can read it; else it is private")] = False,
    base: Annotated[str | None, typer.Option(help="what the hub calls the base, if it was a folder here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Send an adapter or a model to the hub, private unless you say --public; nothing else ever sends anything.

    Example: qlora push runs/example me/my-adapter
    """
    from qlora.exporters.push import push

    found = push(folder, repository, public, base, say)
    if as_json:
        return answer(found)
    say(f"-> {found['url']}")
    return None
