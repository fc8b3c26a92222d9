"""The memory of a sweep is one base model and all adapters with their moments; a sweep that does not fit is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import Sweep, Zoo

from qlora.errors import DoesNotFit
from qlora.memory.planner.breakdown import TRANSIENT, moment_bytes
from qlora.recipe.planning import Machine
from qlora.runs.sweep.sweep_plan import format_plan, plan_common_policy, plan_sweep, refuse_oversized
from qlora.utils.machine import GIB

GPU, CPU = Machine(24 * GIB, 1, 64 * GIB), Machine(None, 1, 16 * GIB)


def plan_of(sweep: Sweep, machine: Machine, *arguments: str):
    return plan_sweep({variant.name: variant.recipe for variant in sweep.variants(*arguments)}, machine)


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "offloaded_adamw"])
def test_one_more_variant_adds_its_adapter_and_its_moments(zoo: Zoo, tmp_path: Path, machine, optimizer) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, f"optim.kind={optimizer}")
    two, three = plan_of(sweep, machine, "adapter.rank=4,8"), plan_of(sweep, machine, "adapter.rank=4,8,16")
    added = three.variants["rank-16"].work.adapters
    on_host = machine is GPU and optimizer.startswith(("paged", "offloaded"))
    for name, before in two.variants.items():
        after = three.variants[name].phases["backward"]
        growth = {component: after[component] - size for component, size in before.phases["backward"].items()}
        moments = moment_bytes(added.values, optimizer)
        assert growth.pop("adapters") == added.held_bytes
        assert growth.pop("optimizer") == (0 if on_host else moments)
        assert not any(growth.values())  # gradients and activations exist for one variant at a time
        if on_host:
            assert three.variants[name].host_bytes - before.host_bytes == moments


def test_a_sweep_needs_less_memory_than_separate_runs(zoo: Zoo, tmp_path: Path) -> None:
    values = plan_of(Sweep(zoo("llama"), tmp_path), CPU, "adapter.rank=4,8", "train.seed=1,2").as_json()
    assert values["peak_bytes"] < values["alone_bytes"] / 3 and values["fits"]
    assert values["trainable_parameters"] == sum(variant["trainable_parameters"] for variant in values["variants"])


def test_the_largest_variant_is_what_the_sweep_needs(zoo: Zoo, tmp_path: Path) -> None:
    plan = plan_of(Sweep(zoo("llama"), tmp_path), CPU, "train.micro_batch=1,4", "data.max_length=32,96")
    largest = max(plan.variants.values(), key=lambda variant: variant.peak_bytes)
    assert plan.largest is largest and largest.work.tokens == 4 * 96


@settings(max_examples=3, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_all_variants_have_the_same_activation_policy(zoo: Zoo, tmp_path_factory, batches, fraction) -> None:
    sweep = Sweep(zoo("llama"), tmp_path_factory.mktemp("plan"), "train.global_batch=64", "data.max_length=96")
    batches = [*dict.fromkeys(batches), 65]
    values = ",".join(map(str, batches))
    unlimited = plan_of(sweep, GPU, f"train.micro_batch={values}")
    persistent = max(
        sum(size for component, size in variant.owners.items() if component not in TRANSIENT)
        for variant in unlimited.variants.values()
    )
    budget = int(persistent + fraction * (unlimited.largest.peak_bytes - persistent)) + 1
    plan = plan_of(sweep, Machine(budget, 1, 64 * GIB), f"train.micro_batch={values}")
    if all(variant.fits for variant in plan.variants.values()):
        policies = {
            (t.work.recompute, t.work.offload, t.work.weights, t.work.resident_layers, t.work.host_embedding)
            for t in plan.variants.values()
        }
        assert len(policies) == 1
        refuse_oversized(plan)
    else:
        with pytest.raises(DoesNotFit):
            refuse_oversized(plan)


def test_a_sweep_that_does_not_fit_is_refused_with_advice(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "memory.budget=2MiB")
    plan = plan_of(sweep, CPU, "adapter.rank=64,128")
    message = r"rank-128, while the other adapters wait: .*fewer than 2 variants"
    with pytest.raises(DoesNotFit, match=message) as caught:
        refuse_oversized(plan)
    assert caught.value.exit_code == 3 and "does not fit" in format_plan(plan)
    with pytest.raises(DoesNotFit):
        sweep.train_together("adapter.rank=64,128")
    assert not (tmp_path / "together").exists()


def test_the_plan_of_a_single_variant_is_that_of_its_run(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    alone = plan_of(sweep, CPU, "adapter.rank=4,8").alone["rank-4"]
    plans = plan_common_policy({"rank-4": alone.work}, alone.budget, None)
    assert plans["rank-4"].peak_bytes == alone.peak_bytes
