"""`qlora advise`: before training, whether to train; after it, what was learned and what was forgotten."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log, print_json


@app.command(context_settings=WITH_OVERRIDES)
def advise(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="a recipe before training, a run's folder after")
    ],
    rows: Annotated[int, typer.Option(min=0, help="held-out rows for the base model; 0: load no weights")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Before a run: prompt, retrieve, LoRA or full training? After it: what was learned and forgotten, and the rank.

    Example: qlora advise recipe.yaml --rows 32
    """
    from qlora.errors import InputError
    from qlora.utils.redact import redacted_values

    if Path(subject).is_dir():
        from qlora.runs.advise.after import advise_after, as_lines

        if context.args:
            raise InputError(f"{context.args[0]}: overrides apply to a recipe, not to a run's folder. Remove them.")
        advice = advise_after(subject, log)
        lines = as_lines(advice)
    else:
        from qlora.recipe.recipe import read
        from qlora.runs.advise import verdict
        from qlora.runs.advise.before import advise_before

        advice = advise_before(read(subject, context.args)[0], rows, log)
        lines = verdict.as_lines(advice)
    if as_json:
        return print_json(redacted_values(advice))
    for line in lines:
        log(line)
    return None
