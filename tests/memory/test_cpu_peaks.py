"""Runs on a CPU take the memory that the plan predicts: complete runs of Llamas, experts and a hybrid, all random."""

import json
import sys
from pathlib import Path

import pytest
from support.paths import BENCHMARKS

WITHIN = 0.10


def test_the_measured_peaks_are_near_the_plan() -> None:
    runs = json.loads((BENCHMARKS / "results" / "cpu_peaks.json").read_text())["runs"]
    assert {run["size"] for run in runs} == {"30M", "100M", "250M", "moe", "hybrid"}
    assert all(abs(run["planned_bytes"] / run["peak_bytes"] - 1) <= WITHIN for run in runs)


@pytest.mark.slow
def test_the_peaks_on_this_machine_are_near_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("cpu_peaks", None)
    import cpu_peaks

    for run in cpu_peaks.runs_of("30M"):
        peaks = cpu_peaks.measured(tmp_path, run, tmp_path)
        assert abs(peaks["planned_bytes"] / peaks["peak_bytes"] - 1) <= WITHIN, run
