"""A sweep on the pretended GPU trains its variants on one base as a separate run does."""

from pathlib import Path

from support.gpu_runs import GpuRuns, checked_gpu
from support.small_runs import differing_tensors, run
from support.sweeps import Sweep


def test_a_sweep_gives_the_adapter_of_a_separate_run(runs: GpuRuns, tmp_path: Path) -> None:
    sweep = Sweep(runs.model(), tmp_path, "train.max_steps=1")
    with checked_gpu():
        sweep.train_together("adapter.rank=4,8")
    with checked_gpu():
        *_, last = sweep.variants("adapter.rank=4,8", out="alone")
        run(last.recipe)
    assert differing_tensors(tmp_path / "together" / last.name, tmp_path / "alone" / last.name) == []
