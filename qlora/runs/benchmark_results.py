"""Results of lm-evaluation-harness on a run: requested by `qlora eval --lm-eval`, kept in the run folder as JSON.

Imports neither torch nor the harness.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora.errors import InputError
from qlora.utils.atomic_files import read_json, write_json
from qlora.utils.paths import similar_path

BENCHMARKS = "lm_eval.json"
MEANS = ("acc_norm", "acc", "exact_match")  # the metric that stands for a task, the first that it has


@dataclass(frozen=True)
class BenchmarkRequest:
    """Tasks of the harness, the first examples of each (None: all), a folder of local tasks, the chat template."""

    tasks: tuple[str, ...]
    limit: int | None = None
    include_path: str | None = None
    chat_template: bool = False


def benchmark_request(
    tasks: str, limit: int | None, include_path: str | None, chat_template: bool
) -> BenchmarkRequest | None:
    """The request of the options; None without tasks. InputError for options without effect, or without the extra."""
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        unused = {"--limit": limit, "--include-path": include_path, "--chat-template": chat_template or None}
        option = next((option for option, value in unused.items() if value is not None), None)
        if option:
            raise InputError(f"{option}: has no effect without --lm-eval. Name tasks: --lm-eval TASK,TASK.")
        return None
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path: {include_path} is no folder.{similar_path(Path(include_path))}")
    if find_spec("lm_eval") is None:
        raise InputError("--lm-eval: needs lm-evaluation-harness. Install it: pip install lm-eval.")
    return BenchmarkRequest(names, limit, include_path, chat_template)


def summary(results: Mapping[str, Any], request: BenchmarkRequest) -> dict[str, Any]:
    """The JSON object of `qlora eval --lm-eval`: metrics by task, and what is needed to run it again."""
    metrics = {task: _metrics(values) for task, values in results["results"].items()}
    counts = results.get("n-samples", {})
    scores = [score for task in metrics if (score := _score(metrics[task])) is not None]
    return {
        "task": "lm-eval",
        "loss": None,
        "perplexity": None,
        "score": sum(scores) / len(scores) if scores else None,
        "rows": sum(int(count["effective"]) for count in counts.values()),
        "tokens": results["tokens"],
        "tasks": {
            task: {
                "metrics": values,
                "rows": int(counts[task]["effective"]) if task in counts else None,
                "shots": results.get("n-shot", {}).get(task),
                "version": results.get("versions", {}).get(task),
            }
            for task, values in metrics.items()
        },
        "limit": request.limit,
        "include_path": request.include_path,
        "chat_template": request.chat_template,
    }


def keep_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Add the tasks of a result to the run's file; a task that is there already is replaced."""
    shared = {key: result[key] for key in ("limit", "include_path", "chat_template")}
    tasks = {task: {**values, **shared} for task, values in result["tasks"].items()}
    write_json(folder / BENCHMARKS, {"tasks": read_results(folder) | tasks})


def read_results(folder: Path) -> dict[str, Any]:
    """Task -> metrics, rows and settings; empty without a file, or for a damaged one."""
    try:
        tasks = read_json(folder / BENCHMARKS).get("tasks")
    except (OSError, ValueError):
        return {}
    return dict(tasks) if isinstance(tasks, dict) else {}


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> value; `acc,none` is `acc`, of several filters `exact_match (strict-match)`."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and "," in key}
    names = {key: key.partition(",")[::2] for key in numbers if "_stderr" not in key}
    return {name if part == "none" else f"{name} ({part})": float(numbers[key]) for key, (name, part) in names.items()}


def _score(metrics: Mapping[str, float]) -> float | None:
    matching = (value for mean in MEANS for name, value in metrics.items() if name.partition(" ")[0] == mean)
    return next(matching, None)
