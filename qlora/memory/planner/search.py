"""The settings that fit a budget and run fastest in it; and when none do, what would make it fit.

Among the ways that fit, the one with the fastest predicted step (pace.py) is taken; one that moves tensors through the
link has to win clearly. What the user set stays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from qlora.memory import Memory
from qlora.memory.planner.advice import How, advise
from qlora.memory.planner.cost_model import seconds
from qlora.memory.planner.memory_plan import Budget, Plan, plan
from qlora.memory.planner.workload import Weights, Workload

# How much faster a way must promise to be whose activations or weights come and go, or which waits for its tokens.
PARKING, STREAMING, GATHERING = 1.05, 1.15, 1.01


@dataclass(frozen=True)
class UserChoices:
    """What the user set; None leaves it to the plan."""

    recompute: int | None = None  # layers
    offload: bool | None = None
    weights: Weights | None = None


def fixed_by(section: Memory, layers: int) -> UserChoices:
    """What a recipe's memory section sets for a model of so many decoder layers."""
    words = {"auto": None, "all": layers, "none": 0}
    recompute = words[section.recompute] if isinstance(section.recompute, str) else section.recompute
    return UserChoices(
        recompute,
        None if section.offload_activations == "auto" else bool(section.offload_activations),
        None if section.weights == "auto" else section.weights,
    )


def choose(work: Workload, budget: Budget, fixed: UserChoices | None = None) -> Plan:
    """The fastest plan of `work` that fits the budget; if none does, the one nearest to it, with advice."""
    fixed = fixed or UserChoices()
    found = _best(work, budget, fixed)
    if found.fits:
        return found

    def fits(other: Workload, how: How) -> bool:
        return _best(other, budget, fixed if how == "as set" else UserChoices()).fits

    return replace(found, advice=advise(found, fits))


def next_smaller(work: Workload, fixed: UserChoices) -> Workload | None:
    """The next way down from `work` that takes less of the device, for a run that ran out; None at the end.

    First half of the layers that keep recompute, then all; then all park. What the user set stays.
    """
    layers = work.shapes.layers
    if fixed.recompute is None and work.recomputed < layers:
        return replace(work, recompute=work.recomputed + max(1, (layers - work.recomputed + 1) // 2))
    if fixed.offload is None and work.parked < layers - 1 and work.device != "cpu":
        return replace(work, offloaded=layers - 1)
    return None


def price(found: Plan) -> float:
    """The predicted seconds of a micro-batch, with a handicap on what moves: a link is shared, a prediction is one."""
    work = found.work
    handicap = (PARKING if work.parked else 1.0) * (STREAMING if work.streamed else 1.0)
    return seconds(work) * handicap * (GATHERING if work.embeds_on_host else 1.0)


def _best(work: Workload, budget: Budget, fixed: UserChoices) -> Plan:
    """The fastest way that fits; else the nearest: the least on the card, or if that fits, in main memory."""
    plans = list(_ways(work, budget, fixed))
    fast = [each for each in plans if each.fits]
    if fast:
        return min(fast, key=price)
    return min(plans, key=lambda each: (0, each.host_bytes) if each.fits_device else (1, each.peak_bytes))


def _ways(work: Workload, budget: Budget, fixed: UserChoices) -> Iterator[Plan]:
    """Every number of layers that recompute, with as few parking or streaming as fit the card."""
    layers, elsewhere = work.shapes.layers, work.device != "cpu"  # a CPU run has no other memory to move to
    parks = {True: [layers - 1], False: [0], None: _spread(layers) if elsewhere else [0]}[fixed.offload]
    every = range(layers + 1) if fixed.recompute is None else [fixed.recompute]
    if fixed.weights != "stream":
        # An embedding that trains, or rows of it, stays where the optimiser is.
        gathers = (False, True) if elsewhere and not work.shapes.tied and not work.adapters.whole else (False,)
        for recompute, gather in product(every, gathers):
            way = replace(work, recompute=recompute, gathers=gather)
            yield _fewest(way, "offloaded", range(parks[0], parks[-1] + 1), budget)
    if fixed.weights == "stream" or (fixed.weights is None and elsewhere):
        for recompute, offloaded in product(_spread(layers) if fixed.recompute is None else every, parks):
            way = replace(work, recompute=recompute, offloaded=offloaded, weights="stream")
            yield _fewest(way, "resident_layers", range(layers - 1, -1, -1), budget)


def _spread(layers: int) -> list[int]:
    """A few numbers of layers from none to all."""
    return sorted({layers * eighth // 8 for eighth in range(9)})


def _fewest(work: Workload, field: str, values: Sequence[int], budget: Budget) -> Plan:
    """The plan with the first of `values` in `field` that fits the card, later ones taking less; else with the last."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        fits = plan(_with(work, field, values[middle]), budget).fits_device
        low, high = (low, middle) if fits else (middle + 1, high)
    return plan(_with(work, field, values[low]), budget)


def _with(work: Workload, field: str, value: Any) -> Workload:
    return replace(work, **{field: value})
