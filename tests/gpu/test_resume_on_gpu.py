"""A run that is resumed on the pretended GPU ends with the adapter of an uninterrupted one, with every optimizer."""

import shutil
from pathlib import Path

import pytest
from support.gpu_runs import GpuRuns, checked_gpu
from support.small_runs import differing_tensors, run

from qlora.training import OPTIMIZERS

# bitsandbytes pages moments of 100,000 values and more: A [1100, 96] of down_proj.
WIDE = ("adapter.rank=1100", 'adapter.targets=["down_proj"]')
QUICK, SLOW = ("adamw", "paged_adamw_32bit"), pytest.mark.slow
SETTINGS = ("train.save_every=1", "train.max_steps=2", "train.keep=9")


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=SLOW) for kind in OPTIMIZERS])
def test_a_resumed_run_is_the_uninterrupted_one(runs: GpuRuns, kind: str) -> None:
    settings = (*SETTINGS, f"optim.kind={kind}", *(WIDE if kind.startswith("paged") else ()))
    whole = runs.train(*settings)
    resumed = runs.recipe(f"resumed-{kind}", *settings)
    output = Path(resumed.train.output)
    output.mkdir()
    shutil.copytree(whole.folder / "checkpoint-000001", output / "checkpoint-000001")
    shutil.copy(whole.folder / "metrics.jsonl", output)
    with checked_gpu():
        run(resumed)
    assert differing_tensors(whole.folder, output) == []
