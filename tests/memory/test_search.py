"""The search: the fastest workload that fits, settings of the user kept, and advice if none fits."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from support.published_models import CONFIGS, work_of

from qlora.memory import Memory
from qlora.memory.planner.memory_plan import Budget, Plan, plan
from qlora.memory.planner.search import UserChoices, choices_of, choose, estimated_cost

GIB = 2**30
RESIDENT = UserChoices(offload=False, weights="resident")


def chosen(name: str, gpu: float, ram: float = 64, **options: Any) -> Plan:
    choices = options.pop("choices", None)
    return choose(work_of(name, **options), Budget(int(gpu * GIB), int(ram * GIB)), choices)


def test_8b_fits_8_gib() -> None:
    for choices in (None, RESIDENT):
        plan = chosen("Llama-3.1-8B", 8, choices=choices)
        assert plan.fits and plan.work.weights == "resident"


def test_the_embedding_is_on_the_host_only_if_that_saves_recomputing() -> None:
    small, large = chosen("Llama-3.1-8B", 12), chosen("Llama-3.1-8B", 24)
    assert small.work.embedding_on_host and small.work.recomputed == 0 and small.owners["embeddings"] == 0
    assert not large.work.embedding_on_host and large.owners["embeddings"] == 2 * 128_256 * 4_096
    assert chosen("Llama-3.1-8B", 6.5).allocated_bytes <= 6.5 * GIB


def test_8b_on_24_gib_keeps_its_activations() -> None:
    plan = chosen("Llama-3.1-8B", 24)
    assert plan.fits and plan.as_json()["choice"]["recompute"] == "none"


def test_70b_fits_24_gib_by_streaming() -> None:
    plan = chosen("Llama-3.1-70B", 24)
    assert plan.fits and plan.as_json()["choice"]["weights"] == "stream"
    assert 0 < plan.work.streamed < 80


def test_70b_on_8_gib_with_16_gib_of_ram_is_refused_with_a_reason() -> None:
    plan = chosen("Llama-3.1-70B", 8, ram=16)
    assert not plan.fits and "host memory" in plan.advice and "16.0 GiB available" in plan.advice


def test_70b_fits_24_gib_with_40_gib_of_ram() -> None:
    plan = chosen("Llama-3.1-70B", 24, ram=40)
    assert plan.fits and plan.work.weights == "stream"


def test_the_advice_names_settings_that_rule_out_a_fit() -> None:
    plan = chosen("Llama-3.1-70B", 24, choices=RESIDENT)
    assert not plan.fits and not plan.work.offloaded and "left at auto" in plan.advice


@pytest.mark.parametrize("options, remedy", [
    ({"micro_batch": 16}, "train.micro_batch=10"),
    ({"max_length": 65536}, "data.max_length=16384"),
    ({"choices": UserChoices(recompute=0, offload=False)}, "left at auto"),
])  # fmt: skip
def test_the_remedy_is_the_smallest_change(options: dict[str, Any], remedy: str) -> None:
    plan = chosen("Llama-3.1-8B", 6, **options)
    assert not plan.fits and remedy in plan.advice


@settings(max_examples=10, deadline=None)  # a search may make hundreds of plans
@given(
    name=some.sampled_from(sorted(CONFIGS)),
    gpu=some.floats(1, 100),
    choices=some.builds(
        UserChoices,
        some.none() | some.integers(0, 90),
        some.none() | some.booleans(),
        some.sampled_from([None, "resident", "stream"]),
    ),
)
def test_settings_of_the_user_are_kept(name: str, gpu: float, choices: UserChoices) -> None:
    plan = chosen(name, gpu, choices=choices)
    work = plan.work
    assert choices.recompute in (None, work.recompute)
    assert choices.offload in (None, work.offloaded > 0)
    assert choices.weights in (None, work.weights)
    assert plan.fits == (plan.peak_bytes <= plan.budget.device_bytes and plan.host_bytes <= 64 * GIB)
    assert bool(plan.advice) != plan.fits


SLOW = ("Llama-3.1-70B", "Qwen3-32B")  # many layers, so many plans


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONFIGS]
)
def test_a_larger_gpu_never_costs_more(name: str) -> None:
    costs = [
        estimated_cost(plan)
        for gpu in (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 160)
        if (plan := chosen(name, gpu)).fits
    ]
    assert costs == sorted(costs, reverse=True)


def test_the_next_faster_workload_does_not_fit() -> None:
    best = chosen("Llama-3.1-8B", 12, choices=RESIDENT)
    faster = work_of("Llama-3.1-8B", recompute=best.work.recomputed - 1)
    assert best.fits and not plan(faster, best.budget).fits


def test_a_cpu_neither_streams_nor_offloads() -> None:
    plan = chosen("Llama-3.1-70B", 24, device="cpu")
    assert not plan.fits and plan.work.weights == "resident" and not plan.work.offloaded


@pytest.mark.parametrize("settings, choices", [
    ({}, UserChoices()),
    ({"recompute": "all", "weights": "resident"}, UserChoices(32, None, "resident")),
    ({"recompute": "none", "offload_activations": False}, UserChoices(0, False, None)),
    ({"recompute": 7, "offload_activations": True, "weights": "stream"}, UserChoices(7, True, "stream")),
])  # fmt: skip
def test_the_choices_of_a_recipe(settings: dict[str, Any], choices: UserChoices) -> None:
    assert choices_of(Memory(**settings), 32) == choices


def test_a_search_takes_less_than_three_seconds() -> None:
    started = time.process_time()
    chosen("Llama-3.1-70B", 24, ram=16)
    assert time.process_time() - started < 3  # 0.7 s on an idle core; a busy one shares its caches
