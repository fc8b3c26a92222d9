"""`qlora sensitivity`: what quantizing each matrix costs, and which ones to keep in 16 bits."""

from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log, print_json


@app.command(context_settings=WITH_OVERRIDES)
def sensitivity(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; key=value after it overrides its settings")],
    keep_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="what kept matrices may add: 5% of the packed base, or 200MiB"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Measure the output error of quantizing each matrix on the recipe's rows, and choose which to keep in 16 bits.

    The matrices are read from disk one at a time. `quant.keep: auto` in a recipe makes the same choice at its start.

    --json prints {matrices: [{name, bytes, error, kl, tokens}], kept, kl_before, kl_after, bytes, budget_bytes,
    packed_bytes, tokens, kl_tokens, peak_bytes}; bytes: what keeping adds.

    Example: qlora sensitivity recipe.yaml --keep-bytes 5%
    """
    from qlora.recipe.check_paths import ENCODING, read_checked

    budget = [] if keep_bytes is None else [f"quant.keep_bytes={keep_bytes}"]
    settings, notes = read_checked(recipe, [*context.args, "quant.keep=auto", *budget], ENCODING)
    for note in notes:
        log(note)
    from qlora.distributed.processes import require_one_process
    from qlora.distributed.watchdog import report_once
    from qlora.runs.sensitivity import measure_sensitivity

    report_once(lambda: require_one_process("sensitivity"))
    result = measure_sensitivity(settings, log)
    if as_json:
        return print_json(result.as_json())
    log(result.table())
    log("in the recipe: quant: {keep: auto" + (f", keep_bytes: {keep_bytes}" if keep_bytes else "") + "}")
    return None
