"""Memory plan of a sweep: one base model, activations and gradients of one step, all adapters and their moments."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.errors import DoesNotFit
from qlora.memory.planner.config_reader import read
from qlora.memory.planner.memory_plan import Budget, Plan, plan, plan_summary
from qlora.memory.planner.optimizer_state import moment_bytes, moments_leave_device
from qlora.memory.planner.search import UserChoices, choose, estimated_cost
from qlora.memory.planner.workload import WaitingAdapters, Workload
from qlora.model.download import find_config
from qlora.recipe.planning import Machine, user_choices, workload_of
from qlora.recipe.recipe import Recipe
from qlora.runs.sweep.shared_settings import name_in_errors
from qlora.utils.machine import GIB

NO_COMMON_POLICY = "No activation policy fits all variants. Set memory.recompute=all, or sweep similar data.max_length."


@dataclass(frozen=True)
class SweepPlan:
    """A plan for each variant's steps while the other adapters wait; activation policies are the same in all plans."""

    variants: Mapping[str, Plan]
    alone: Mapping[str, Plan]  # of each variant as a separate run

    @property
    def largest(self) -> Plan:
        """The plan with the highest peak: what the sweep needs."""
        return max(self.variants.values(), key=lambda plan: (not plan.fits, plan.peak_bytes))

    def as_json(self) -> dict[str, Any]:
        """What `qlora plan --json` prints, for the sweep and for each variant."""
        variants = [
            {
                "name": name,
                "trainable_parameters": plan.work.adapters.values,
                "peak_bytes": plan.peak_bytes,
                "alone_bytes": self.alone[name].peak_bytes,
                "fits": plan.fits,
            }
            for name, plan in self.variants.items()
        ]
        trainable = sum(plan.work.adapters.values for plan in self.variants.values())
        values = self.largest.as_json() | {"trainable_parameters": trainable, "fits": all(v["fits"] for v in variants)}
        return values | {"alone_bytes": sum(plan.peak_bytes for plan in self.alone.values()), "variants": variants}


def format_plan(plan: SweepPlan) -> str:
    """The plan as text: a line for each variant, the memory of the sweep, and that of separate runs at once."""
    values = plan.as_json()
    width = max(len(variant["name"]) for variant in values["variants"])
    lines = [
        f"  {variant['name']:{width}}  {variant['trainable_parameters']:>13,} trainable  "
        f"{variant['peak_bytes'] / GIB:7.2f} GiB in the sweep, {variant['alone_bytes'] / GIB:.2f} GiB alone"
        for variant in values["variants"]
    ]
    total = (
        f"{len(lines)} adapters on one base model: {values['peak_bytes'] / GIB:.2f} GiB of "
        f"{values['gpu_bytes'] / GIB:.2f} GiB"
    )
    separate = f"as separate runs at once: {values['alone_bytes'] / GIB:.2f} GiB"
    verdict = "fits (predicted)" if values["fits"] else f"does not fit: {values['advice']}"
    return "\n".join([*lines, f"{total}, {plan_summary(plan.largest)}", separate, verdict])


def plan_sweep(recipes: Mapping[str, Recipe], machine: Machine) -> SweepPlan:
    """The plan of a sweep on a machine. BaseModelError if the model's shapes are not known."""
    first = next(iter(recipes.values()))  # model, quant and memory settings are the same in all recipes
    shapes = read(find_config(first.model.name, first.model.revision), first.model.name)
    workloads = {}
    for name, recipe in recipes.items():
        with name_in_errors(name):
            workloads[name] = workload_of(recipe, shapes, machine)
    budget, choices = machine.budget(first), user_choices(first, shapes.layers)
    alone = {name: choose(work, budget, choices) for name, work in workloads.items()}
    return SweepPlan(plan_common_policy(_with_waiting_adapters(workloads), budget, choices), alone)


def refuse_oversized(plan: SweepPlan) -> None:
    """DoesNotFit, with what would make it fit, if the plan of a variant exceeds the memory."""
    name, largest = next((name, variant) for name, variant in plan.variants.items() if variant is plan.largest)
    if not largest.fits:
        count = len(plan.variants)
        fewer = "" if count == 1 else f" Or train fewer than {count} variants at once."
        raise DoesNotFit(f"memory: {name}, while the other adapters wait: {largest.advice}{fewer}")


def plan_common_policy(
    workloads: Mapping[str, Workload], budget: Budget, choices: UserChoices | None
) -> dict[str, Plan]:
    """The variants' plans under one activation policy: of those that variants choose, the fastest that fits all."""
    chosen = {name: choose(work, budget, choices) for name, work in workloads.items()}
    if not all(plan.fits for plan in chosen.values()):
        return chosen
    for candidate in sorted(chosen.values(), key=estimated_cost):
        plans = {name: plan(_with_policy_of(candidate.work, work), budget) for name, work in workloads.items()}
        if all(variant.fits for variant in plans.values()):
            return plans
    return {
        name: variant if variant.fits else replace(variant, advice=NO_COMMON_POLICY) for name, variant in plans.items()
    }


def _with_policy_of(candidate: Workload, work: Workload) -> Workload:
    """`candidate` with what differs between variants taken from `work`."""
    return replace(
        candidate,
        adapters=work.adapters,
        optimizer=work.optimizer,
        micro_batch=work.micro_batch,
        max_length=work.max_length,
        packing=work.packing,
        waiting=work.waiting,
    )


def _with_waiting_adapters(workloads: Mapping[str, Workload]) -> dict[str, Workload]:
    """Each workload with the adapters and moments of all others."""
    sizes = {name: _waiting_bytes(work) for name, work in workloads.items()}
    totals = [sum(column) for column in zip(*sizes.values(), strict=True)]
    others = {
        name: WaitingAdapters(*(total - size for total, size in zip(totals, sizes[name], strict=True)))
        for name in workloads
    }
    return {name: replace(work, waiting=others[name]) for name, work in workloads.items()}


def _waiting_bytes(work: Workload) -> tuple[int, int, int]:
    """Bytes of an adapter, of its moments on the device, and of its moments in host memory."""
    moments = moment_bytes(work.adapters.values, work.optimizer)
    on_host = moments_leave_device(work.optimizer)
    return work.adapters.held_bytes, 0 if on_host else moments, moments if on_host else 0
