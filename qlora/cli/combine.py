"""`qlora combine`: not built yet, and it says so."""

from qlora.cli.app import WITH_OVERRIDES, app


@app.command(context_settings=WITH_OVERRIDES)
def combine() -> None:
    """Make one adapter out of several. (Not built yet.)

    Example: qlora combine --help
    """
    from qlora.errors import NotBuiltYet

    raise NotBuiltYet("`qlora combine` is not built yet. `qlora --help` lists what is.")
