"""Runs on a CPU obey the plan too: whole runs of random Llamas take what was planned."""

import json
import sys
from pathlib import Path

import pytest
from support.paths import BENCHMARKS

WITHIN = 0.10


def test_what_was_measured_of_three_sizes_is_within_a_tenth_of_the_plan() -> None:
    runs = json.loads((BENCHMARKS / "results" / "cpu_peaks.json").read_text())["runs"]
    assert {run["size"] for run in runs} == {"30M", "100M", "250M"}
    assert all(abs(run["planned_bytes"] / run["peak_bytes"] - 1) <= WITHIN for run in runs)


@pytest.mark.slow
def test_it_is_so_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("cpu_peaks", None)
    import cpu_peaks

    for run in cpu_peaks.runs_of("30M"):
        found = cpu_peaks.measured(tmp_path, run, tmp_path)
        assert abs(found["planned_bytes"] / found["peak_bytes"] - 1) <= WITHIN, run
