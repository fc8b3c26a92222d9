"""`qlora demo`: the main job on the embedded base, in about a minute."""

from typing import Annotated

import typer

from qlora.cli.app import app, say


@app.command()
def demo(out: Annotated[str, typer.Option("--out", help="folder of the run")] = "demo-run") -> None:
    """Train, evaluate, merge and certify on a tiny model that comes with the program; no download.

    Example: qlora demo --out demo-run
    """
    from qlora.demo.walkthrough import demonstrate

    demonstrate(out, say)
