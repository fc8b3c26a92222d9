"""`qlora export`: a run in the form that other programs load, with a certificate of what changed."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder or a checkpoint")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder that does not exist yet")],
    to: Annotated[str, typer.Option("--to", help="merged | adapter | portable | ollama")],
    base: Annotated[str, typer.Option(help="dequantized (what was trained on) | original (16-bit)")] = "dequantized",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 | float16 | float32; default: the run's own")] = None,
    data: Annotated[str | None, typer.Option(help="rows of the certificate; default: the run's held-out ones")] = None,
    rows: Annotated[int | None, typer.Option(min=0, help="how many rows; 0 leaves the certificate out")] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0.0, help="fail above this mean KL; default 0.05, none onto the original base")
    ] = None,
    max_lost: Annotated[
        float, typer.Option(min=0.0, help="fail if rounding takes more than this share of the update")
    ] = 1.0,
    rank: Annotated[
        int | None, typer.Option(min=1, help="portable DoRA: of the nearest LoRA; default: the adapter's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Write a merged model, an adapter or an Ollama folder, certify merged ones, and say which servers take it.

    Example: qlora export runs/example merged --to merged --dtype bfloat16
    """
    from qlora.exporters.export_run import ExportRequest, export_run
    from qlora.runs.load_run import load_run

    found = export_run(
        load_run(run, None, say), ExportRequest(to, base, dtype, data, rows, max_kl, max_lost, rank), out, say
    )
    if as_json:
        return answer(found)
    say(f"{found['bytes'] / 2**20:,.1f} MiB -> {found['path']}")
    return None
