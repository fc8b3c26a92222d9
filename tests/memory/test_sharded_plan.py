"""The plan of a shared base: what is frozen is divided, what trains is not, and `auto` shares only what must be."""

from dataclasses import replace

import pytest
from support.paths import ROOT
from support.published_models import CONFIGS, work_of

from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.search import choose
from qlora.recipe.planning import better, elsewhere, plans_for
from qlora.recipe.recipe import from_mapping, read

GIB = 2**30
FROZEN = ("packed_base", "embeddings", "head", "norms")


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_shares_of_what_is_frozen_make_the_whole(name: str, processes: int) -> None:
    whole = plan(work_of(name), Budget(0)).owners
    each = plan(replace(work_of(name), processes=processes, sharded=True), Budget(0)).owners
    for owner in FROZEN:
        assert 0 <= processes * each[owner] - whole[owner] < processes, owner
    assert each["adapters"] == whole["adapters"]
    assert 0 < each["gathered"] < whole["packed_base"]


@pytest.mark.parametrize(("name", "kind"), [("Llama-3.1-8B", "ddp"), ("Llama-3.1-70B", "fsdp"), ("Qwen3-32B", "ddp")])
def test_auto_shares_a_base_only_where_a_card_can_not_hold_it(name: str, kind: str) -> None:
    recipe = from_mapping({"model": name, "data": {"train": "-"}}, "defaults")[0]
    plans = plans_for(recipe, shapes_of(CONFIGS[name], name), elsewhere("24GiB", 2, "64GiB"))
    assert list(plans) == ["ddp", "fsdp"] and better(plans) == kind and plans[kind].fits


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_strategy_that_is_written_down_is_the_only_one_planned(kind: str) -> None:
    recipe = from_mapping({"model": "-", "data": {"train": "-"}, "distributed": {"kind": kind}}, "defaults")[0]
    shapes = shapes_of(CONFIGS["Llama-3.1-8B"], "-")
    assert list(plans_for(recipe, shapes, elsewhere("24GiB", 2, None))) == [kind]
    assert list(plans_for(recipe, shapes, elsewhere("24GiB", 1, None))) == ["fsdp" if kind == "fsdp" else "single"]


def test_the_recipe_for_70b_on_two_cards_fits_them() -> None:
    recipe = read(str(ROOT / "recipes/2x24gb-llama3.3-70b.yaml"))[0]
    shapes = shapes_of(CONFIGS["Llama-3.1-70B"], "70B")
    found = plans_for(recipe, shapes, elsewhere("24GiB", 2, "64GiB"))["fsdp"]
    assert found.fits and found.work.streamed < shapes.layers / 2
    assert found.host_bytes <= 32 * GIB  # two processes share the machine's


def test_who_can_not_hold_the_base_is_told_to_share_it() -> None:
    found = choose(replace(work_of("Llama-3.1-8B", max_length=512), processes=4), Budget(6 * GIB, int(2.5 * GIB)))
    assert not found.fits and "distributed.kind=fsdp" in found.advice
