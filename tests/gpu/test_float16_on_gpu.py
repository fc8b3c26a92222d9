"""A pretended GPU without bfloat16: `auto` takes float16, says so and plans for it; `qlora doctor` proves it."""

from pathlib import Path

import torch
from support.gpu_runs import GpuRuns, checked_gpu
from support.small_runs import metrics, recipe_of, run
from support.tiny_models import save_model

from qlora.recipe.planning import Machine, Planner
from qlora.runs.doctor import computes, examine_machine, report_lines

TURING = (7, 5)


def test_auto_is_float16_on_a_gpu_without_bfloat16(runs: GpuRuns, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    options = ("model.dtype=auto", "train.max_steps=2", "data.packing=true", "memory.recompute=1")
    recipe = recipe_of(base, runs.records, tmp_path / "run", *options)
    with checked_gpu(capability=TURING):
        manifest = run(recipe)
        work = Planner(recipe).plan(Machine.local()).work
    assert manifest["base"]["dtype"] == "float16" and manifest["float16"]["in_float32"] == {}
    assert [line["loss_scale"] for line in metrics(tmp_path / "run")] == [2.0**16] * 2
    assert (work.float16, work.dtype_bytes) == (True, 4)


def test_the_doctor_proves_the_dtypes_of_the_gpu() -> None:
    with checked_gpu(capability=TURING):
        report = examine_machine()
    (device,) = report["devices"]
    assert computes(report) and [proof["name"] for proof in device["proofs"]] == ["NF4", "float32", "float16"]
    assert (device["type"], device["capability"], device["bf16"]) == ("cuda", "7.5", False)
    assert any("no bfloat16; a 16-bit base computes in float16" in line for line in report_lines(report))
