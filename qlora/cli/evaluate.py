"""`qlora eval`: loss or accuracy of a run or a model."""

from typing import Annotated, Any

import typer

from qlora.cli.app import app, log, print_json


@app.command(name="eval")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="a run's folder, a checkpoint, or a model")],
    adapter: Annotated[str | None, typer.Option(help="folder of the adapter to use instead of the run's")] = None,
    data: Annotated[str | None, typer.Option(help="examples to measure on; default: the run's held-out ones")] = None,
    task: Annotated[str, typer.Option(help="loss | exact-match | choice | preference")] = "loss",
    beside_base: Annotated[
        bool, typer.Option("--beside-base", help="evaluate the base model too, and both on a general text")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Measure loss and perplexity, or the fraction of correct answers, on held-out examples.

    Example: qlora eval runs/example --task exact-match --data test.jsonl
    """
    from qlora.runs.eval_tasks import require_task
    from qlora.runs.find_run import find_run, require_examples

    require_task(task)
    files = find_run(run, adapter, log)
    require_examples(files.recipe, data)
    from qlora.data.types import count_of
    from qlora.runs.evaluate import evaluate_run
    from qlora.runs.load_run import load_run

    result = evaluate_run(load_run(files, None, log), data, task, beside_base, log)
    if as_json:
        return print_json(result)
    if task == "preference":
        return log(_preference_line(result))
    log(_line(result) + f" on {count_of(result['rows'], 'example')}")
    if beside_base:
        general = result["forgetting"]
        log(f"base model: {_line(result['base'])}")
        log(f"general text ({general['tokens']} tokens): loss {general['base_loss']:.4f} -> {general['loss']:.4f}")
    return None


def _preference_line(result: dict[str, Any]) -> str:
    base = f" (base {100 * result['base']['likelier']:.1f} %)" if "base" in result else ""
    return (
        f"chosen answer preferred in {100 * result['score']:.1f} % of {result['rows']:,} pairs, margin "
        f"{result['margin']:.3f}; likelier per token in {100 * result['likelier']:.1f} %{base}"
    )


def _line(result: dict[str, Any]) -> str:
    perplexity = "too large for a number" if result["perplexity"] is None else f"{result['perplexity']:.3f}"
    score = "" if result["score"] is None else f", score {100 * result['score']:.1f} %"
    return f"loss {result['loss']:.4f}, perplexity {perplexity}{score}"
