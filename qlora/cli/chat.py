"""`qlora chat`: not built yet, and it says so."""

from qlora.cli.app import WITH_OVERRIDES, app


@app.command(context_settings=WITH_OVERRIDES)
def chat() -> None:
    """Talk to a run. (Not built yet.)

    Example: qlora chat --help
    """
    from qlora.errors import NotBuiltYet

    raise NotBuiltYet("`qlora chat` is not built yet. `qlora --help` lists what is.")
