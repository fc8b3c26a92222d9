"""The memory of a sweep: one base, one step's activations and gradients, and every variant's adapter and moments."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.model.download import find_config
from qlora.errors import DoesNotFit
from qlora.memory.planner.search import UserChoices, choose, price
from qlora.memory.planner.breakdown import moment_bytes, moments_wait
from qlora.memory.planner.memory_plan import Budget, Plan, plan
from qlora.memory.planner.config_reader import read
from qlora.memory.planner.memory_plan import in_words
from qlora.memory.planner.workload import WaitingAdapters, Workload
from qlora.recipe.planning import Machine, left_open, work_of
from qlora.recipe.recipe import Recipe
from qlora.runs.sweep.shared_settings import named

GIB = 2**30
APART = "No one arrangement of the layers fits all of them. Set memory.recompute=all, or sweep rows of like length."


@dataclass(frozen=True)
class Together:
    """Each variant's turn while the others wait, all under one arrangement of the layers."""

    turns: Mapping[str, Plan]
    alone: Mapping[str, Plan]  # what each would choose with the machine to itself

    @property
    def most(self) -> Plan:
        """The turn that needs most: what the sweep needs."""
        return max(self.turns.values(), key=lambda turn: (not turn.fits, turn.peak_bytes))

    def as_json(self) -> dict[str, Any]:
        """As `plan --json` answers, and the same by variant."""
        variants = [
            {
                "name": name,
                "trainable_parameters": turn.work.adapters.values,
                "peak_bytes": turn.peak_bytes,
                "alone_bytes": self.alone[name].peak_bytes,
                "fits": turn.fits,
            }
            for name, turn in self.turns.items()
        ]
        trainable = sum(turn.work.adapters.values for turn in self.turns.values())
        said = self.most.as_json() | {"trainable_parameters": trainable, "fits": all(v["fits"] for v in variants)}
        return said | {"alone_bytes": sum(each.peak_bytes for each in self.alone.values()), "variants": variants}


def table(found: Together) -> str:
    """The plan for people: each variant's turn, what all take together, and what they would take apart."""
    said = found.as_json()
    width = max(len(each["name"]) for each in said["variants"])
    lines = [
        f"  {each['name']:{width}}  {each['trainable_parameters']:>13,} trainable  {each['peak_bytes'] / GIB:7.2f} GiB "
        f"in its turn, {each['alone_bytes'] / GIB:.2f} GiB alone"
        for each in said["variants"]
    ]
    whole = (
        f"{len(lines)} adapters on one base: {said['peak_bytes'] / GIB:.2f} GiB of {said['gpu_bytes'] / GIB:.2f} GiB"
    )
    apart = f"as runs of their own at once: {said['alone_bytes'] / GIB:.2f} GiB"
    verdict = "fits (predicted)" if said["fits"] else f"does not fit: {said['advice']}"
    return "\n".join([*lines, f"{whole}, {in_words(found.most)}", apart, verdict])


def plan_sweep(recipes: Mapping[str, Recipe], machine: Machine) -> Together:
    """The plan of variants on a machine. BaseModelError if the model's shapes are not known."""
    leader = next(iter(recipes.values()))
    shapes = read(find_config(leader.model.name, leader.model.revision), leader.model.name)
    works = {}
    for name, recipe in recipes.items():
        with named(name):
            works[name] = work_of(recipe, shapes, machine)
    budget, fixed = machine.budget(leader), left_open(leader, shapes.layers)
    alone = {name: choose(work, budget, fixed) for name, work in works.items()}
    return Together(arranged(_waiting(works), budget, fixed), alone)


def refuse_too_much(found: Together) -> None:
    """DoesNotFit, with what would make it fit, if one of the turns does not."""
    name, worst = next(((name, turn) for name, turn in found.turns.items() if turn is found.most))
    if not worst.fits:
        each = "" if len(found.turns) == 1 else f" Or train fewer than {len(found.turns)} variants at once."
        raise DoesNotFit(f"memory: {name}, while the others wait: {worst.advice}{each}")


def arranged(works: Mapping[str, Workload], budget: Budget, fixed: UserChoices) -> dict[str, Plan]:
    """Each turn's plan under one arrangement: of those that single turns choose, the fastest that fits all of them."""
    chosen = {name: choose(work, budget, fixed) for name, work in works.items()}
    if not all(each.fits for each in chosen.values()):
        return chosen
    for leader in sorted(chosen.values(), key=price):
        turns = {name: plan(_arranged_as(leader.work, work), budget) for name, work in works.items()}
        if all(turn.fits for turn in turns.values()):
            return turns
    return {name: turn if turn.fits else replace(turn, advice=APART) for name, turn in turns.items()}


def _arranged_as(like: Workload, work: Workload) -> Workload:
    """`work` with its layers where those of `like` are: of that one everything but what is each variant's own."""
    return replace(
        like,
        adapters=work.adapters,
        optimizer=work.optimizer,
        micro_batch=work.micro_batch,
        max_length=work.max_length,
        packing=work.packing,
        beside=work.beside,
    )


def _waiting(works: Mapping[str, Workload]) -> dict[str, Workload]:
    """Each work beside all others' adapters and moments."""
    held = {name: _held(work) for name, work in works.items()}
    whole = [sum(column) for column in zip(*held.values(), strict=True)]
    others = {name: WaitingAdapters(*(all_ - own for all_, own in zip(whole, held[name], strict=True))) for name in works}
    return {name: replace(work, beside=others[name]) for name, work in works.items()}


def _held(work: Workload) -> tuple[int, int, int]:
    """Bytes of an adapter, of its moments, and of its moments where they wait in main memory."""
    moments = moment_bytes(work.adapters.values, work.optimizer)
    away = moments_wait(work.optimizer)
    return work.adapters.held_bytes, 0 if away else moments, moments if away else 0
