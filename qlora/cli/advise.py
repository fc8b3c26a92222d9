"""`qlora advise`: is training the right tool, and afterwards: did it learn, did it forget."""

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, answer, app, say


@app.command(context_settings=WITH_OVERRIDES)
def advise(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="a recipe before training, a run's folder after")
    ],
    rows: Annotated[int, typer.Option(min=0, help="held-out rows that the base answers; 0: no weight is loaded")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Advice with the numbers behind it: prompt, retrieve, LoRA or full before a run; learnt, forgot, rank after it.

    Example: qlora advise recipe.yaml --rows 32
    """
    from qlora.errors import InputError
    from qlora.utils.redact import redacted_values

    if Path(subject).is_dir():
        from qlora.runs.advise.after import advise_after, as_lines

        if context.args:
            raise InputError(f"{context.args[0]}: a run is as it is; overrides go with a recipe.")
        found = advise_after(subject, say)
        lines = as_lines(found)
    else:
        from qlora.recipe.recipe import read
        from qlora.runs.advise import verdict
        from qlora.runs.advise.before import advise_before

        found = advise_before(read(subject, context.args)[0], rows, say)
        lines = verdict.as_lines(found)
    if as_json:
        return answer(redacted_values(found))
    for line in lines:
        say(line)
    return None
