"""The memory of a sweep is one base and every variant's adapter and moments; what does not fit is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import Sweep, Zoo

from qlora.errors import DoesNotFit
from qlora.memory.planner.breakdown import PASSING, moment_bytes
from qlora.recipe.planning import Machine
from qlora.runs.sweep.sweep_plan import arranged, plan_sweep, refuse_too_much, table

GIB = 2**30
CARD, CPU = Machine(24 * GIB, 1, 64 * GIB), Machine(None, 1, 16 * GIB)


def plan_of(sweep: Sweep, machine: Machine, *arguments: str):
    return plan_sweep({variant.name: variant.recipe for variant in sweep.variants(*arguments)}, machine)


@pytest.mark.parametrize("machine", [CARD, CPU], ids=["card", "cpu"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "hosted_adamw"])
def test_a_variant_more_is_its_adapter_and_its_moments_more(zoo: Zoo, tmp_path: Path, machine, optimizer) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, f"optim.kind={optimizer}")
    two, three = plan_of(sweep, machine, "adapter.rank=4,8"), plan_of(sweep, machine, "adapter.rank=4,8,16")
    more = three.turns["rank-16"].work.adapters
    waits = not (machine is CARD and optimizer.startswith(("paged", "hosted")))
    for name, before in two.turns.items():
        after = three.turns[name].phases["backward"]
        grown = {owner: after[owner] - size for owner, size in before.phases["backward"].items()}
        moments = moment_bytes(more.values, optimizer)
        assert grown.pop("adapters") == more.held_bytes
        assert grown.pop("optimizer") == (moments if waits else 0)
        assert not any(grown.values())  # gradients and activations are those of the one whose turn it is
        if not waits:
            assert three.turns[name].host_bytes - before.host_bytes == moments


def test_one_base_is_less_than_as_many_as_variants(zoo: Zoo, tmp_path: Path) -> None:
    found = plan_of(Sweep(zoo("llama"), tmp_path), CPU, "adapter.rank=4,8", "train.seed=1,2").as_json()
    assert found["peak_bytes"] < found["alone_bytes"] / 3 and found["fits"]
    assert found["trainable_parameters"] == sum(each["trainable_parameters"] for each in found["variants"])


def test_the_turn_that_needs_most_is_what_the_sweep_needs(zoo: Zoo, tmp_path: Path) -> None:
    found = plan_of(Sweep(zoo("llama"), tmp_path), CPU, "train.micro_batch=1,4", "data.max_length=32,96")
    most = max(found.turns.values(), key=lambda turn: turn.peak_bytes)
    assert found.most is most and most.work.tokens == 4 * 96


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_all_turns_have_one_arrangement_of_the_layers(zoo: Zoo, tmp_path_factory, batches, share) -> None:
    sweep = Sweep(zoo("llama"), tmp_path_factory.mktemp("plan"), "train.global_batch=64", "data.max_length=96")
    batches = [*dict.fromkeys(batches), 65]
    lists = ",".join(map(str, batches))
    free = plan_of(sweep, CARD, f"train.micro_batch={lists}")
    least = max(
        sum(size for owner, size in turn.owners.items() if owner not in PASSING) for turn in free.turns.values()
    )
    budget = int(least + share * (free.most.peak_bytes - least)) + 1
    found = plan_of(sweep, Machine(budget, 1, 64 * GIB), f"train.micro_batch={lists}")
    if all(turn.fits for turn in found.turns.values()):
        ways = {
            (t.work.recompute, t.work.offloaded, t.work.weights, t.work.resident_layers, t.work.gathers)
            for t in found.turns.values()
        }
        assert len(ways) == 1
        refuse_too_much(found)
    else:
        with pytest.raises(DoesNotFit):
            refuse_too_much(found)


def test_what_does_not_fit_is_refused_with_what_would(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "memory.budget=2MiB")
    found = plan_of(sweep, CPU, "adapter.rank=64,128")
    with pytest.raises(DoesNotFit, match=r"rank-128, while the others wait: .*fewer than 2 variants") as caught:
        refuse_too_much(found)
    assert caught.value.exit_code == 3 and "does not fit" in table(found)
    with pytest.raises(DoesNotFit):
        sweep.together("adapter.rank=64,128")
    assert not (tmp_path / "together").exists()


def test_the_plan_of_one_is_its_own(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    found = plan_of(sweep, CPU, "adapter.rank=4,8")
    only = arranged({"rank-4": found.alone["rank-4"].work}, found.alone["rank-4"].budget, None)
    assert only["rank-4"].peak_bytes == found.alone["rank-4"].peak_bytes
