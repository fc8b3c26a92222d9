"""`qlora eval`: loss or accuracy of a run or a model."""

from typing import Annotated, Any

import typer

from qlora.cli.app import QUANT_HELP, app, log, print_json


@app.command(name="eval")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="a run's folder, a checkpoint, or a model")],
    adapter: Annotated[str | None, typer.Option(help="folder of the adapter to use instead of the run's")] = None,
    data: Annotated[str | None, typer.Option(help="examples to measure on; default: the run's held-out ones")] = None,
    task: Annotated[str, typer.Option(help="loss | exact-match | choice | preference")] = "loss",
    quant: Annotated[str | None, typer.Option(help=QUANT_HELP)] = None,
    beside_base: Annotated[
        bool, typer.Option("--beside-base", help="evaluate the base model too, and both on a general text")
    ] = False,
    lm_eval: Annotated[str, typer.Option("--lm-eval", metavar="TASK,TASK", help="tasks of lm-evaluation-harness")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="with --lm-eval: the first N examples of each task")] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="with --lm-eval: a folder of your own tasks")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="with --lm-eval: examples as conversations of the run's template")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Measure loss and perplexity, or the fraction of correct answers, on held-out examples.

    Example: qlora eval runs/example --task exact-match --data test.jsonl
    """
    from qlora.runs.benchmark_results import benchmark_request
    from qlora.runs.eval_tasks import require_task
    from qlora.runs.find_run import find_run, require_examples

    require_task(task)
    request = benchmark_request(lm_eval, limit, include_path, chat_template)
    files = find_run(run, adapter, log, quant)
    if request is not None:
        from qlora.runs.run_benchmarks import run_benchmarks

        return _show_benchmarks(run_benchmarks(files, request, adapter is None, log), as_json)
    require_examples(files.recipe, data)
    from qlora.runs.evaluate import evaluate_run
    from qlora.runs.load_run import load_run

    result = evaluate_run(load_run(files, None, log), data, task, beside_base, log)
    return print_json(result) if as_json else _show(result, task, beside_base)


def _show(result: dict[str, Any], task: str, beside_base: bool) -> None:
    from qlora.data.types import count_of

    if task == "preference":
        return log(_preference_line(result))
    log(_line(result) + f" on {count_of(result['rows'], 'example')}")
    if beside_base:
        general = result["forgetting"]
        log(f"base model: {_line(result['base'])}")
        log(f"general text ({general['tokens']} tokens): loss {general['base_loss']:.4f} -> {general['loss']:.4f}")
    return None


def _show_benchmarks(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(result)
    for name, values in result["tasks"].items():
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in values["metrics"].items())
        rows = "" if values["rows"] is None else f" on {values['rows']:,} examples"
        log(f"{name}: {metrics}{rows}")
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
