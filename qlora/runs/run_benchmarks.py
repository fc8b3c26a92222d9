"""`qlora eval --lm-eval`: the tasks run on a loaded run, and their results in its folder and on its page."""

from typing import Any

from qlora.runs.artifacts import PAGE
from qlora.runs.benchmark_results import BenchmarkRequest, keep_results, summary
from qlora.runs.compare import write_report_page
from qlora.runs.find_run import RunFiles
from qlora.runs.load_run import load_run
from qlora.runs.memory_setup import Log


def run_benchmarks(files: RunFiles, request: BenchmarkRequest, keeps: bool, log: Log) -> dict[str, Any]:
    """The JSON object of the tasks; `keeps`: the results are of the run itself, so its folder gets them."""
    from qlora.runs.harness_model import run_tasks  # takes seconds to import, and its errors come after ours

    result = summary(run_tasks(load_run(files, None, log), request, log), request)
    if keeps and files.run is not None:
        keep_results(files.run, result)
        write_report_page([str(files.run)], str(files.run / PAGE))
    return result
