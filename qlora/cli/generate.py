"""`qlora generate`: answers from a run."""

from typing import Annotated

import typer

from qlora.cli.app import QUANT_HELP, app, log, print_json


@app.command()
def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, a checkpoint, or a model")],
    prompt: Annotated[str, typer.Argument(metavar='"PROMPT"|FILE.jsonl|-', help="a text, a file, or - for stdin")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="instead of the run's adapter; several: one answer from each"),
    ] = None,
    quant: Annotated[str | None, typer.Option(help=QUANT_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Answer a prompt, or every line of a JSONL file with `prompt` or `messages`.

    Example: qlora generate runs/example "Write a haiku about memory."
    """
    from qlora.runs.adapter_names import named_adapters
    from qlora.runs.find_run import find_run, require_adapters
    from qlora.runs.prompts import read_prompts

    prompts = read_prompts(prompt)
    adapters = require_adapters(named_adapters(adapter or []))
    files = find_run(run, None, log, quant)
    from qlora.runs.generate import generate_from_prompts, generate_with_adapters
    from qlora.runs.load_run import load_run, load_with_adapters

    if adapters:
        loaded, switch = load_with_adapters(files, adapters, log)
        rows = generate_with_adapters(loaded, switch, prompts, max_new_tokens, temperature)
    else:
        rows = generate_from_prompts(load_run(files, None, log), prompts, max_new_tokens, temperature)
    if as_json:
        return print_json({"rows": rows})
    for row in rows:
        typer.echo(f"{row['adapter']}: {row['text']}" if adapter and len(adapter) > 1 else row["text"])
    return None
