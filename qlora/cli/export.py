"""`qlora export`: a run in a form that other programs load, with a certificate of how close it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.app import app, log, print_json
from qlora.exporters import MAX_KL, MAX_LOST, MERGE_BASE, WHOLE_MODELS, ExportRequest

if TYPE_CHECKING:
    from qlora.runs.find_run import RunFiles

Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16 | float16 | float32; for gguf q8_0 | q4_0 too; default: the run's, for gguf float16"),
]
MaxKl = Annotated[
    float | None,
    typer.Option(min=0.0, help=f"fail above this mean KL; default {MAX_KL}, no limit with --base original"),
]
MaxLost = Annotated[float, typer.Option(min=0.0, help="fail if rounding loses more than this fraction of the update")]
LlamaCpp = Annotated[
    str | None,
    typer.Option("--llama-cpp", metavar="DIR", help="for gguf: a checkout of llama.cpp that writes the file"),
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="of the LoRA for a portable DoRA; default: the adapter's rank"),
]


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder or a checkpoint")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="a folder that does not exist yet")],
    to: Annotated[str, typer.Option("--to", help="merged | adapter | portable | gguf | gguf-adapter | mlx | ollama")],
    base: Annotated[str, typer.Option(help="dequantized (as in training) | original (16-bit)")] = MERGE_BASE,
    dtype: Dtype = None,
    data: Annotated[
        str | None, typer.Option(help="examples for the certificate; default: the run's held-out ones")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=0, help="number of examples; 0: no certificate")] = None,
    max_kl: MaxKl = None,
    max_lost: MaxLost = MAX_LOST,
    rank: Rank = None,
    llama_cpp: LlamaCpp = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Write a run as a model or an adapter for other programs, measure it against the run, and list those that load it.

    Example: qlora export runs/example merged --to merged --dtype bfloat16
    """
    request = ExportRequest(to, base, dtype, data, rows, max_kl, max_lost, rank, llama_cpp)
    files = _check(request, run, out)
    from qlora.exporters.export_run import export_run
    from qlora.runs.load_run import load_run

    result = export_run(load_run(files, None, log), request, out, log)
    if as_json:
        return print_json(result)
    log(f"{result['bytes'] / 2**20:,.1f} MiB -> {result['path']}")
    return None


def _check(request: ExportRequest, run: str, out: str) -> "RunFiles":
    """The run's files. InputError for an option or a path that can't be used, before anything heavy is imported."""
    from qlora.runs.find_run import find_run, require_examples

    request.check(Path(out))
    files = find_run(run, None, log)
    request.check_source(files.adapter is not None, files.recipe.adapter.kind)
    if request.data or (request.to in WHOLE_MODELS and request.rows != 0):
        require_examples(files.recipe, request.data, "--rows 0 leaves the certificate out")
    return files
