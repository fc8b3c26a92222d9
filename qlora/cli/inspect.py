"""`qlora inspect`: not built yet, and it says so."""

from qlora.cli.app import WITH_OVERRIDES, app


@app.command(context_settings=WITH_OVERRIDES)
def inspect() -> None:
    """Rank and spectrum of each adapted matrix. (Not built yet.)

    Example: qlora inspect --help
    """
    from qlora.errors import NotBuiltYet

    raise NotBuiltYet("`qlora inspect` is not built yet. `qlora --help` lists what is.")
