"""`qlora plan`: the memory plan of a recipe, or of a model with the default settings. Imports no torch.

The plan is for this machine, or for one that is described by sizes such as 24GiB.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.memory.planner.memory_plan import Plan, plan_summary
from qlora.recipe.default_recipe import default_recipe
from qlora.recipe.planning import Machine, Planner, better_strategy
from qlora.recipe.recipe import Recipe, read
from qlora.utils.byte_sizes import size_bytes
from qlora.utils.machine import gib_or_mib


def plan_recipe(
    name: str, overrides: Sequence[str], gpu: str | None, gpus: int, ram: str | None
) -> tuple[dict[str, Any], str]:
    """The plan of a recipe file or of a model: the object of `plan --json`, and a table."""
    recipe = read_recipe_or_model(name, overrides)
    planner = Planner(recipe)
    planner.require_shapes()  # before the machine is asked, which may import torch
    plans = planner.plan_strategies(requested_machine(gpu, gpus, ram))
    plan = plans[better_strategy(plans)]
    strategies = {kind: {"peak_bytes": plan.peak_bytes, "fits": plan.fits} for kind, plan in plans.items()}
    lines = [f"{kind}: {_summary_per_gpu(plan)}" for kind, plan in plans.items()] if len(plans) > 1 else []
    return plan.as_json() | {"strategies": strategies}, "\n".join([str(plan), *lines])


def _summary_per_gpu(plan: Plan) -> str:
    """One strategy on several GPUs, in a line."""
    fits = "" if plan.fits else ", does not fit"
    return f"{gib_or_mib(plan.peak_bytes)} of each GPU{fits}; {plan_summary(plan)}"


def read_recipe_or_model(name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe in a file, or the default recipe of a model. RecipeError, BaseModelError."""
    path = Path(name)
    if name.endswith((".yaml", ".yml")) or (path.is_file() and path.name != "config.json"):
        return read(name, overrides)[0]
    return default_recipe(name, overrides)


def requested_machine(gpu: str | None, gpus: int, ram: str | None) -> Machine:
    """The machine described by sizes such as 24GiB; where a size is None, that of this machine."""
    if gpu:
        return Machine.described(gpu, gpus, ram)
    local = Machine.local(gpus)
    return local if not ram else replace(local, gpus=gpus, host_bytes=size_bytes(ram), local_ranks=1)
