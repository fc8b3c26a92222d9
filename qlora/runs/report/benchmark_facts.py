"""Results of lm-evaluation-harness as facts of a page: a line for each metric of each task."""

from collections.abc import Mapping

from qlora.runs.report.facts import Facts
from qlora.runs.report.run_data import RunData
from qlora.runs.report.series import finite


def benchmark_facts(run: RunData) -> Facts:
    """`task, metric` -> value and the number of examples."""
    facts: Facts = {}
    for task, result in run.benchmarks.items():
        metrics = result.get("metrics") if isinstance(result, Mapping) else None
        rows = result.get("rows") if isinstance(result, Mapping) else None
        count = f" on {rows:,} examples" if isinstance(rows, int) else ""
        for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
            if finite(value):
                facts[f"{task}, {metric}"] = f"{value:.4f}{count}"
    return facts
