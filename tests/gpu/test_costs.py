"""What a micro-batch and a step cost on a GPU: waits of the host, kernel launches. The limits may only fall."""

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from support.gpu_runs import GpuRun, GpuRuns
from support.pretended_gpu import Counters
from support.pretended_gpu.counters import Event

SYNCS_PER_MASK = 1  # of transformers, for each kind of mask in a micro-batch, whatever the number of layers
SYNCS_PER_STEP = 1
# Forward and backward of a micro-batch, by memory.recompute: with the fused kernels, and without Triton.
LAUNCHES_PER_LAYER = {"none": 142, "all": 183} if find_spec("triton") else {"none": 249, "all": 320}
LAUNCHES_BESIDE_LAYERS = 60
BASE = ("model.dtype=bfloat16", "data.packing=false", "train.micro_batch=1", "data.max_length=64")


@pytest.fixture(autouse=True, scope="module")
def _warm(runs: GpuRuns) -> None:
    """Kernels are probed once per process."""
    runs.train("model.dtype=bfloat16")


def trained(runs: GpuRuns, micro_batches: int = 1, steps: int = 1, recompute: str = "none", **model: object) -> GpuRun:
    settings = (f"train.global_batch={micro_batches}", f"train.max_steps={steps}", f"memory.recompute={recompute}")
    return runs.train(*BASE, *settings, **model)  # type: ignore[arg-type]


def per_micro_batch(runs: GpuRuns, count: Callable[[Counters], float], **options: object) -> float:
    """What a second micro-batch adds to a step of one."""
    few, many = (count(trained(runs, number, **options).counters) for number in (1, 2))  # type: ignore[arg-type]
    return many - few


def total(events: Counter[Event]) -> int:
    return sum(events.values())


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("layers", [2, 3])
def test_the_host_waits_once_per_micro_batch(runs: GpuRuns, layers: int) -> None:
    assert per_micro_batch(runs, lambda counters: total(counters.syncs), layers=layers) <= SYNCS_PER_MASK


@pytest.mark.slow
def test_the_host_waits_once_for_each_kind_of_mask(runs: GpuRuns) -> None:
    kinds = 2  # full and sliding
    assert per_micro_batch(runs, lambda counters: total(counters.syncs), family="gemma2") <= kinds * SYNCS_PER_MASK


def test_the_host_waits_a_few_times_per_step(runs: GpuRuns) -> None:
    few, many = (trained(runs, steps=steps).counters.syncs for steps in (4, 5))  # gradients are checked in the first 4
    assert total(many - few) <= SYNCS_PER_STEP + SYNCS_PER_MASK, many - few


@pytest.mark.parametrize(
    ("recompute", "layers"), [("none", (2, 3)), pytest.param("all", (2, 3), marks=pytest.mark.slow)]
)
def test_launches_per_layer(runs: GpuRuns, recompute: str, layers: tuple[int, int]) -> None:
    launches = [
        per_micro_batch(runs, lambda counters: counters.launch_count, recompute=recompute, layers=number)
        for number in layers
    ]
    per_layer = (launches[1] - launches[0]) / (layers[1] - layers[0])
    assert per_layer <= LAUNCHES_PER_LAYER[recompute]
    assert launches[0] - layers[0] * per_layer <= LAUNCHES_BESIDE_LAYERS


def test_no_copy_is_pageable_in_a_step(runs: GpuRuns) -> None:
    few, many = (trained(runs, number).counters.copies for number in (1, 2))
    assert {event.what for event in many - few} == {"host to GPU, pinned, compute stream"}
