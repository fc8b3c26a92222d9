"""The plan of a sharded base: frozen weights are divided, trained ones are not; `auto` shards only if it must."""

from dataclasses import replace

import pytest
from support.paths import ROOT
from support.published_models import CONFIGS, work_of

from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.search import choose
from qlora.recipe.planning import Machine, Planner, better_strategy
from qlora.recipe.recipe import from_mapping, read

GIB = 2**30
FROZEN = ("packed_base", "embeddings", "head", "norms")


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_shards_of_all_ranks_make_the_base(name: str, processes: int) -> None:
    unsharded = plan(work_of(name), Budget(0)).owners
    sharded = plan(replace(work_of(name), processes=processes, sharded=True), Budget(0)).owners
    for component in FROZEN:
        assert 0 <= processes * sharded[component] - unsharded[component] < processes, component
    assert sharded["adapters"] == unsharded["adapters"]
    assert 0 < sharded["gathered"] < unsharded["packed_base"]


@pytest.mark.parametrize(("name", "kind"), [("Llama-3.1-8B", "ddp"), ("Llama-3.1-70B", "fsdp"), ("Qwen3-32B", "ddp")])
def test_auto_shards_only_a_base_that_a_gpu_can_not_hold(name: str, kind: str) -> None:
    recipe = from_mapping({"model": name, "data": {"train": "-"}}, "defaults")[0]
    plans = Planner(recipe, shapes_of(CONFIGS[name], name)).plan_strategies(Machine.described("24GiB", 2, "64GiB"))
    assert list(plans) == ["ddp", "fsdp"] and better_strategy(plans) == kind and plans[kind].fits


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_strategy_of_the_recipe_is_the_only_one_planned(kind: str) -> None:
    recipe = from_mapping({"model": "-", "data": {"train": "-"}, "distributed": {"kind": kind}}, "defaults")[0]
    shapes = shapes_of(CONFIGS["Llama-3.1-8B"], "-")
    planner = Planner(recipe, shapes)
    assert list(planner.plan_strategies(Machine.described("24GiB", 2, None))) == [kind]
    assert list(planner.plan_strategies(Machine.described("24GiB", 1, None))) == [
        "fsdp" if kind == "fsdp" else "single"
    ]


def test_the_recipe_for_70b_fits_its_two_gpus() -> None:
    recipe = read(str(ROOT / "recipes/2x24gb-llama3.3-70b.yaml"))[0]
    shapes = shapes_of(CONFIGS["Llama-3.1-70B"], "70B")
    planned = Planner(recipe, shapes).plan_strategies(Machine.described("24GiB", 2, "64GiB"))["fsdp"]
    assert planned.fits and planned.work.streamed < shapes.layers / 2
    assert planned.host_bytes <= 32 * GIB  # two ranks share the host memory


def test_the_advice_for_ranks_that_can_not_hold_the_base_is_fsdp() -> None:
    work = replace(work_of("Llama-3.1-8B", max_length=512), processes=4)
    planned = choose(work, Budget(6 * GIB, int(2.5 * GIB)))
    assert not planned.fits and "distributed.kind=fsdp" in planned.advice
