"""`qlora eval`: how good a run or a model is, measured."""

from typing import Annotated, Any

import typer

from qlora.cli.app import answer, app, say


@app.command(name="eval")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="a run's folder, a checkpoint, or a model")],
    adapter: Annotated[str | None, typer.Option(help="an adapter folder to put on it instead of its own")] = None,
    data: Annotated[str | None, typer.Option(help="rows to measure on; default: the run's held-out ones")] = None,
    task: Annotated[str, typer.Option(help="loss | exact-match | choice")] = "loss",
    beside_base: Annotated[
        bool, typer.Option("--beside-base", help="the base alone as well, and what was forgotten of a general text")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Measure loss and perplexity, or the share of right answers, on held-out rows.

    Example: qlora eval runs/example --task exact-match --data test.jsonl
    """
    from qlora.runs.evaluate_and_generate import measure
    from qlora.runs.load_run import load_run

    found = measure(load_run(run, adapter, say), data, task, beside_base, say)
    if as_json:
        return answer(found)
    say(_line(found) + f" on {found['rows']} rows")
    if beside_base:
        said = found["forgetting"]
        say(f"the base alone: {_line(found['base'])}")
        say(f"general text ({said['tokens']} tokens): loss {said['base_loss']:.4f} -> {said['loss']:.4f}")
    return None


def _line(found: dict[str, Any]) -> str:
    perplexity = "beyond all numbers" if found["perplexity"] is None else f"{found['perplexity']:.3f}"
    score = "" if found["score"] is None else f", score {100 * found['score']:.1f} %"
    return f"loss {found['loss']:.4f}, perplexity {perplexity}{score}"
