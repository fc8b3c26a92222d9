"""`qlora check`: all problems of a recipe that can be found without loading weights."""

from typing import Annotated

import typer

from qlora.cli.app import WITH_OVERRIDES, app, log, print_json


@app.command(context_settings=WITH_OVERRIDES)
def check(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="a recipe's YAML file; key=value after it overrides its settings")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Check a recipe: schema, files, labels and memory, without loading weights.

    Example: qlora check recipe.yaml
    """
    from qlora.recipe.findings import check_settings, summarize_findings
    from qlora.utils.redact import redacted_values

    settings, result = check_settings(recipe, context.args)
    if settings:
        from qlora.recipe.check import check_contents

        check_contents(settings, result)
    if as_json:
        print_json(redacted_values(result))  # findings quote records
    else:
        for line in (*result["data"]["notes"], *result["data"]["summary"]) if result["data"] else ():
            log(line)
        for kind in ("warnings", "problems"):
            for line in summarize_findings(result[kind]):
                log(f"{kind[:-1]}: {line}")
        unchecked = "" if settings else "; data and memory were not checked yet"
        log("ok" if result["ok"] else f"not ok: the problems above would stop a run{unchecked}")
    if not result["ok"]:
        raise typer.Exit(3 if [problem["where"] for problem in result["problems"]] == ["memory"] else 2)
