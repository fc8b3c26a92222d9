"""`qlora advise`: before training, whether to train; after it, what was learned and what was forgotten."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log, print_json


@app.command(context_settings=WITH_OVERRIDES)
def advise(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="a recipe before training, a run's folder after")
    ],
    rows: Annotated[int, typer.Option(min=0, help="held-out examples for the base model; 0: load no weights")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Before a run: prompt, retrieve, LoRA or full training? After it: what was learned and forgotten, and the rank.

    Example: qlora advise recipe.yaml --rows 32
    """
    from qlora.utils.redact import redacted_values

    if Path(subject).is_dir():
        advice, lines = _after(subject, context.args)
    else:
        advice, lines = _before(subject, context.args, rows)
    if as_json:
        return print_json(redacted_values(advice))
    for line in lines:
        log(line)
    return None


def _after(run: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The advice after a run: the JSON object, and its lines."""
    from qlora.errors import InputError
    from qlora.runs.artifacts import require_manifest
    from qlora.runs.find_run import find_run, require_examples

    if overrides:
        raise InputError(f"{overrides[0]}: overrides apply to a recipe, not to a run's folder. Remove them.")
    require_manifest(Path(run))
    require_examples(find_run(run).recipe, None)
    from qlora.runs.advise.after import advise_after, as_lines

    advice = advise_after(run, log)
    return advice, as_lines(advice)


def _before(recipe: str, overrides: Sequence[str], rows: int) -> tuple[dict[str, Any], list[str]]:
    """The advice before a run: the JSON object, and its lines."""
    from qlora.recipe.check_paths import ENCODING, read_checked

    settings, _ = read_checked(recipe, overrides, ENCODING)
    from qlora.runs.advise import verdict

    if settings.objective.sided_format is not None:
        from qlora.runs.advise.preferences import VERDICTS, advise_answers

        advice = advise_answers(settings, rows, log)
        return advice, verdict.as_lines(advice, VERDICTS)
    from qlora.runs.advise.before import advise_before

    advice = advise_before(settings, rows, log)
    return advice, verdict.as_lines(advice)
