"""`qlora generate`: answers from a run."""

from typing import Annotated

import typer

from qlora.cli.app import answer, app, say


@app.command()
def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, a checkpoint, or a model")],
    prompt: Annotated[str, typer.Argument(metavar='"PROMPT"|FILE.jsonl|-', help="a text, a file, or - for stdin")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH: an adapter instead of the run's own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Answer a prompt, or every line of a JSONL file with `prompt` or `messages`.

    Example: qlora generate runs/example "Write a haiku about memory."
    """
    from qlora.ask import answer_prompts
    from qlora.reopen import open_run

    rows = answer_prompts(open_run(run, _path_of(adapter or []), say), prompt, max_new_tokens, temperature)
    if as_json:
        return answer({"rows": rows})
    for row in rows:
        typer.echo(row["text"])
    return None


def _path_of(adapters: list[str]) -> str | None:
    """The folder of the one adapter that was named."""
    from qlora.errors import NotBuiltYet

    if len(adapters) > 1:
        raise NotBuiltYet("--adapter: several adapters at once are not built yet. Name one.")
    return adapters[0].partition("=")[2] or adapters[0] if adapters else None
