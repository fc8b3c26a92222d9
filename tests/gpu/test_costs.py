"""What a micro-batch and a step cost on a GPU: waits of the host, kernel launches. The limits may only fall."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from importlib.util import find_spec

import pytest
from support.gpu_runs import GpuRuns, checked_gpu
from support.pretended_gpu import Counters
from support.pretended_gpu.counters import Event
from support.small_runs import run
from support.training_hooks import before_forward

SYNCS_PER_MASK = 1  # of transformers, for each kind of mask in a micro-batch, whatever the number of layers
SYNCS_PER_STEP = 1
# Forward and backward of a micro-batch, by memory.recompute: with the fused kernels, and without Triton.
LAUNCHES_PER_LAYER = {"none": 142, "all": 183} if find_spec("triton") else {"none": 249, "all": 320}
LAUNCHES_BESIDE_LAYERS = 60
BASE = ("model.dtype=bfloat16", "data.packing=false", "train.micro_batch=1", "data.max_length=64")
Measure = Callable[..., Counters]


@pytest.fixture(scope="module")
def last_interval(runs: GpuRuns) -> Measure:
    """What the GPU does from the last forward but one of a run to the last: in a micro-batch, or in a step of one."""

    @cache
    def measure(layers: int, family: str, recompute: str, steps: int) -> Counters:
        batch = 3 if steps == 1 else 1  # micro-batches: kernels are probed in the first one
        settings = (f"train.global_batch={batch}", f"train.max_steps={steps}", f"memory.recompute={recompute}")
        name = f"costs-{family}-{layers}-{recompute}-{steps}"
        recipe = runs.recipe(name, *BASE, *settings, family=family, layers=layers)
        counts: list[Counters] = []
        with checked_gpu() as gpu, before_forward(lambda model: counts.append(deepcopy(gpu.counters))):
            run(recipe)
        before, after = counts[-2:]
        return Counters(
            syncs=after.syncs - before.syncs,
            copies=after.copies - before.copies,
            launches=after.launches - before.launches,
        )

    return lambda layers, family="llama", recompute="none", steps=1: measure(layers, family, recompute, steps)


def total(events: Counter[Event]) -> int:
    return sum(events.values())


@pytest.mark.parametrize("layers", [2, 3])
def test_the_host_waits_once_per_micro_batch(last_interval: Measure, layers: int) -> None:
    assert 0 < total(last_interval(layers).syncs) <= SYNCS_PER_MASK


@pytest.mark.slow
def test_the_host_waits_once_for_each_kind_of_mask(last_interval: Measure) -> None:
    kinds = 2  # full and sliding
    assert total(last_interval(2, "gemma2").syncs) <= kinds * SYNCS_PER_MASK


def test_the_host_waits_a_few_times_per_step(last_interval: Measure) -> None:
    syncs = last_interval(2, steps=6).syncs  # gradients are checked in the first 4
    assert 0 < total(syncs) <= SYNCS_PER_STEP + SYNCS_PER_MASK, syncs


@pytest.mark.parametrize("recompute", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_launches_per_layer(last_interval: Measure, recompute: str) -> None:
    few, many = (last_interval(layers, recompute=recompute).launch_count for layers in (2, 3))
    per_layer = many - few
    assert 100 < per_layer <= LAUNCHES_PER_LAYER[recompute]
    assert few - 2 * per_layer <= LAUNCHES_BESIDE_LAYERS


def test_no_copy_is_pageable_in_a_step(last_interval: Measure) -> None:
    assert {event.what for event in last_interval(2).copies} == {"host to GPU, pinned, compute stream"}
