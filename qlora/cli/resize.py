"""`qlora resize`: not built yet, and it says so."""

from qlora.cli.app import WITH_OVERRIDES, app


@app.command(context_settings=WITH_OVERRIDES)
def resize() -> None:
    """Truncate an adapter to a lower rank. (Not built yet.)

    Example: qlora resize --help
    """
    from qlora.errors import NotBuiltYet

    raise NotBuiltYet("`qlora resize` is not built yet. `qlora --help` lists what is.")
