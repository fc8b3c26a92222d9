"""`qlora demo`: the main job on the embedded model, in about a minute."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log


@app.command()
def demo(out: Annotated[str, typer.Option("--out", help="folder of the run")] = "demo-run") -> None:
    """Train, evaluate, merge and certify on the embedded tiny model; no download.

    Example: qlora demo --out demo-run
    """
    from qlora.utils.paths import require_writable_folder

    require_writable_folder(Path(out), "--out")
    from qlora.demo.walkthrough import run_demo

    run_demo(out, log)
