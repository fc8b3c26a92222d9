"""Two ranks with a pretended GPU each: DDP and FSDP train with the adapter of one GPU, up to the order of sums."""

import os
from pathlib import Path

import pytest
import torch
from support.child_processes import Notify
from support.gpu_runs import GpuRuns, checked_gpu
from support.rank_processes import pair
from support.small_runs import adapter_tensors, run

SETTINGS = ("train.max_steps=1", "data.packing=false", "train.micro_batch=2", "train.global_batch=4")


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_give_the_adapter_of_one(runs: GpuRuns, tmp_path: Path, kind: str) -> None:
    alone = runs.train(*SETTINGS)
    recipe = runs.recipe(f"two-{kind}", *SETTINGS, f"distributed.kind={kind}")

    def work(rank: int, notify: Notify) -> None:
        del os.environ["ACCELERATE_USE_CPU"]
        with checked_gpu(several=True, index=rank):
            run(recipe)

    assert [child.wait() for child in pair(work, tmp_path)] == [0, 0], (tmp_path / "log-0").read_text()
    expected, actual = adapter_tensors(alone.folder), adapter_tensors(recipe.train.output)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-4, msg=name)
