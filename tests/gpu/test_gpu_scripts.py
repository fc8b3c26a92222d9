"""The scripts of `make gpu`, run on the pretended GPU with the smallest model: they must work at the first try."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu_runs import GpuRuns
from support.paths import BENCHMARKS
from support.pretended_gpu import pretended_gpu

sys.path.insert(0, str(BENCHMARKS))

import gpu
import gpu_kernels
import gpu_memory
import gpu_runs
from gpu_report import Report, verdict
from memory import RandomModel
from support.published_models import _llama, workload

from qlora.memory.planner.config_reader import shapes_of

GPU = torch.device("cuda")


def small_runs_in(runs: GpuRuns, folder: Path) -> gpu_runs.Runs:
    settings = ("data.max_length=64", "train.max_steps=2", "train.global_batch=4", "model.dtype=float32")
    return gpu_runs.Runs(folder, runs.model(), runs.records, *settings)


def wrong(report: Report) -> dict[str, Any]:
    return {what: entry for what, entry in report.checks.items() if not entry["right"]}


@pytest.mark.slow
def test_the_first_item_runs(runs: GpuRuns, tmp_path: Path) -> None:
    report, small = Report("first", folder=tmp_path), small_runs_in(runs, tmp_path)
    with pretended_gpu():
        gpu_runs.first(report, small)
    assert {*wrong(report)} <= {"resume with AdamW"}, wrong(report)  # 8 steps, but these runs take 2


@pytest.mark.slow
def test_every_policy_gives_the_adapter_of_the_plain_run(runs: GpuRuns, tmp_path: Path) -> None:
    report, small = Report("policies", folder=tmp_path), small_runs_in(runs, tmp_path)
    with pretended_gpu():
        gpu_runs.policies(report, small)
        gpu_runs.deterministic(report, small)
    assert wrong(report) == {} and len(report.checks) == len(gpu_runs.POLICIES) + 2


def test_the_kernels_are_checked(tmp_path: Path) -> None:
    sizes = gpu_kernels.Sizes((32,), 48, (4, 2, 8))
    report = Report("kernels", folder=tmp_path)
    with pretended_gpu():
        report.check("attention", lambda: gpu_kernels._noted(True))
        for name, chosen in gpu_kernels.choices(GPU, sizes).items():
            report.check(name, lambda c=chosen: gpu_kernels._chosen(c(torch.float32)))
        report.check("copy", lambda: gpu_kernels.copies(GPU, "to the GPU"))
    assert {*wrong(report)} <= {"copy"}


def test_peaks_and_profile(tmp_path: Path) -> None:
    config = _llama(64, 32, 64, 2, 4, 2)
    work = workload(shapes_of(config, "tiny"), rank=2, device="cuda")
    report = Report("peaks", folder=tmp_path)
    with pretended_gpu():
        model = RandomModel(work, config, "cuda")
        gpu_memory.peaks(report, model, work, (32,))
        gpu_memory.profile(report, model, work, 32, gpu_memory.ACTIVITIES[:1])  # a CPU build records no GPU
    assert [entry["error"] for entry in report.checks.values() if "error" in entry] == []


def test_a_report_goes_on_where_it_ended(tmp_path: Path) -> None:
    def fails() -> bool:
        raise RuntimeError("no memory\nand more")

    report = Report("item", folder=tmp_path)
    report.check("one", lambda: True)
    report.check("two", fails)
    assert verdict("item", tmp_path) == "WRONG: two" and verdict("other", tmp_path) == "no result"
    assert report.checks["two"]["error"] == "RuntimeError: no memory"
    again = Report("item", folder=tmp_path)
    again.check("one", fails)  # is right already
    again.check("two", lambda: {"right": True, "seconds": 1})
    assert verdict("item", tmp_path) == "right (2 checks)"
    late = Report("late", seconds=-1, folder=tmp_path)
    late.check("one", lambda: True)
    late.save()
    assert json.loads((tmp_path / "late.json").read_text())["complete"] is False


def test_the_parts_of_make_gpu_are_scripts_with_results_of_their_own() -> None:
    for name, part in gpu.PARTS.items():
        text = (BENCHMARKS / part.command[0]).read_text(encoding="utf-8")
        kind = name.rpartition("-")[2]
        assert part.command[0] == "speed.py" or name in text or kind in text
    assert "gpu-paging" not in gpu.missing(Path("nowhere")) and len(gpu.missing(Path("nowhere"))) == len(gpu.PARTS) - 1
    assert len({part.item for part in gpu.PARTS.values()}) == len(gpu.PARTS)
