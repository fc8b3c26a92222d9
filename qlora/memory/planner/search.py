"""The settings that fit a budget and run fastest; if none fit, what would.

Of the workloads that fit, the one with the fastest predicted step (cost_model.py) is chosen; one that moves tensors
over the host-device link must be clearly faster. Settings of the user are not changed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from qlora.memory import Memory
from qlora.memory.planner.advice import Source, advise
from qlora.memory.planner.cost_model import seconds
from qlora.memory.planner.memory_plan import Budget, Plan, plan
from qlora.memory.planner.workload import Weights, Workload

# By how much a workload that moves activations, weights or embeddings must be faster in the prediction.
OFFLOAD_MARGIN, STREAM_MARGIN, HOST_EMBEDDING_MARGIN = 1.05, 1.15, 1.01


@dataclass(frozen=True)
class UserChoices:
    """What the user set; None leaves it to the plan."""

    recompute: int | None = None  # layers
    offload: bool | None = None
    weights: Weights | None = None


def choices_of(section: Memory, layers: int) -> UserChoices:
    """What a recipe's memory section sets, for a model with so many decoder layers."""
    words = {"auto": None, "all": layers, "none": 0}
    recompute = words[section.recompute] if isinstance(section.recompute, str) else section.recompute
    return UserChoices(
        recompute,
        None if section.offload_activations == "auto" else bool(section.offload_activations),
        None if section.weights == "auto" else section.weights,
    )


def choose(work: Workload, budget: Budget, choices: UserChoices | None = None) -> Plan:
    """The fastest plan of `work` that fits the budget; if none does, the nearest one, with advice."""
    choices = choices or UserChoices()
    best = _best(work, budget, choices)
    if best.fits:
        return best

    def fits(other: Workload, source: Source) -> bool:
        return _fits(other, budget, choices if source == "user" else UserChoices())

    return replace(best, advice=advise(best, fits))


def next_smaller(work: Workload, choices: UserChoices) -> Workload | None:
    """The next workload that takes less device memory, for a run that ran out of it; None if there is none.

    Half of the layers that do not recompute start to, then all; then all offload. Settings of the user are not changed.
    """
    layers = work.shapes.layers
    if choices.recompute is None and work.recomputed < layers:
        return replace(work, recompute=work.recomputed + max(1, (layers - work.recomputed + 1) // 2))
    if choices.offload is None and work.offloaded < layers - 1 and work.device != "cpu":
        return replace(work, offload=layers - 1)
    return None


def estimated_cost(plan: Plan) -> float:
    """Predicted seconds of a micro-batch, times margins for what moves: links may be shared, predictions inexact."""
    return estimated_cost_of(plan.work)


def estimated_cost_of(work: Workload) -> float:
    """`estimated_cost` of a workload."""
    margin = (OFFLOAD_MARGIN if work.offloaded else 1.0) * (STREAM_MARGIN if work.streamed else 1.0)
    return seconds(work) * margin * (HOST_EMBEDDING_MARGIN if work.embedding_on_host else 1.0)


def _best(work: Workload, budget: Budget, choices: UserChoices) -> Plan:
    """The fastest plan that fits; else the one with the least host memory, or if no peak fits, the smallest peak."""
    plans = list(_candidates(work, budget, choices))
    fitting = [candidate for candidate in plans if candidate.fits]
    if fitting:
        return min(fitting, key=estimated_cost)
    return min(plans, key=lambda plan: (0, plan.host_bytes) if plan.fits_device else (1, plan.peak_bytes))


def _fits(work: Workload, budget: Budget, choices: UserChoices) -> bool:
    """Whether any plan fits. More recomputed layers take less memory, so that only their largest number is tried."""
    recompute = work.shapes.layers if choices.recompute is None else choices.recompute
    return any(plan.fits for plan in _candidates(work, budget, replace(choices, recompute=recompute)))


def _candidates(work: Workload, budget: Budget, choices: UserChoices) -> Iterator[Plan]:
    """A plan for each number of recomputed layers, with as few offloaded or streamed layers as fit the GPU.

    Left out are those that can't be faster than one before: what recomputes or moves more only takes longer.
    """
    layers, on_gpu = work.shapes.layers, work.device != "cpu"  # on a CPU there is no other memory to move to
    offload_numbers = {True: [layers - 1], False: [0], None: _spread(layers) if on_gpu else [0]}[choices.offload]
    recompute_numbers = range(layers + 1) if choices.recompute is None else [choices.recompute]
    lowest_cost = math.inf
    if choices.weights != "stream":
        # An embedding that trains stays with the optimizer on the device.
        movable = on_gpu and not work.shapes.tied and not work.adapters.full_values
        for recompute, host_embedding in product(recompute_numbers, (False, True) if movable else (False,)):
            candidate = replace(work, recompute=recompute, host_embedding=host_embedding)
            if lowest_cost < math.inf and estimated_cost_of(candidate) >= lowest_cost:
                continue
            offload = range(offload_numbers[0], offload_numbers[-1] + 1)
            plan = _first_that_fits(candidate, "offload", offload, budget)
            lowest_cost = min(lowest_cost, estimated_cost(plan)) if plan.fits else lowest_cost
            yield plan
    if choices.weights == "stream" or (choices.weights is None and on_gpu):
        few = _spread(layers) if choices.recompute is None else recompute_numbers
        for recompute, number in product(few, offload_numbers):
            candidate = replace(work, recompute=recompute, offload=number, weights="stream")
            resident = replace(candidate, weights="resident")
            if lowest_cost < math.inf and STREAM_MARGIN * estimated_cost_of(resident) >= lowest_cost:
                continue
            plan = _first_that_fits(candidate, "resident_layers", range(layers - 1, -1, -1), budget)
            lowest_cost = min(lowest_cost, estimated_cost(plan)) if plan.fits else lowest_cost
            yield plan


def _spread(layers: int) -> list[int]:
    """A few numbers of layers from none to all."""
    return sorted({layers * eighth // 8 for eighth in range(9)})


def _first_that_fits(work: Workload, field: str, values: Sequence[int], budget: Budget) -> Plan:
    """The plan with the first of `values` that fits the GPU, else with the last. Later values take less memory."""
    low, high = 0, len(values) - 1
    last = plan(_with(work, field, values[high]), budget)
    if not low < high or not last.fits_device:
        return last
    while low < high:
        middle = (low + high) // 2
        fits = plan(_with(work, field, values[middle]), budget).fits_device
        low, high = (low, middle) if fits else (middle + 1, high)
    return plan(_with(work, field, values[low]), budget)


def _with(work: Workload, field: str, value: Any) -> Workload:
    return replace(work, **{field: value})
