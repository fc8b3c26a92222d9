"""What would make a plan fit: the smallest change of a recipe that does, found by planning it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from qlora.memory.planner.breakdown import OUTSIDE
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.workload import Storage, Workload

How = Literal["as set", "auto"]  # memory.* as the user set it, or left to the plan
Fits = Callable[[Workload, How], bool]
SHORTEST = 128  # tokens of a row below which no advice goes
LEAST_RANK = 4


def gib(size: int) -> str:
    """`7.4 GiB`."""
    return f"{size / 2**30:.1f} GiB"


def advise(plan: Plan, fits: Fits) -> str:
    """Why the plan does not fit, and what would make it fit."""
    return f"{_reason(plan)} {_remedy(plan.work, fits)}"


def _remedy(work: Workload, fits: Fits) -> str:
    if fits(work, "auto"):
        return "What would fit: memory.recompute, memory.offload_activations and memory.weights left at auto."
    change = next((words for words, other in _changes(work) if fits(other, "as set")), None)
    if change:
        return f"What would fit: {change}."
    return "No smaller setting of this run fits: take a smaller model, or more memory."


def _reason(plan: Plan) -> str:
    reasons = []
    if not plan.fits_device:
        place = "the card" if plan.work.device == "cuda" else "main memory"
        owners = sorted(plan.owners.items(), key=lambda item: -item[1])
        largest = ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in owners[:3] if name not in OUTSIDE)
        reasons.append(
            f"{gib(plan.peak_bytes)} needed on {place}, {gib(plan.budget.device_bytes)} there (largest: {largest})."
        )
    if not plan.fits_host and plan.budget.host_bytes is not None:
        streamed = " to stream the frozen layers from" if plan.work.streamed else ""
        reasons.append(f"{gib(plan.host_bytes)} of main memory needed{streamed}, {gib(plan.budget.host_bytes)} there.")
    return " ".join(reasons)


def _changes(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Changes of a recipe in words, and the work they make: the ones that cost least first."""
    for rows in range(work.micro_batch - 1, 0, -1):
        yield f"train.micro_batch={rows} (the result stays the same)", replace(work, micro_batch=rows)
    if work.processes > 1 and not work.sharded:
        yield "distributed.kind=fsdp", replace(work, sharded=True)
    if work.optimizer != "paged_adamw_8bit":
        yield "optim.kind=paged_adamw_8bit", replace(work, optimizer="paged_adamw_8bit")
    one = replace(work, micro_batch=1)
    with_one = "train.micro_batch=1 and " if work.micro_batch > 1 else ""
    if work.storage != Storage():
        yield f"{with_one}quant.kind=nf4 with double quantisation", replace(one, storage=Storage())
    length = work.max_length // 2
    while length >= SHORTEST:
        yield f"{with_one}data.max_length={length}", replace(one, max_length=length)
        length //= 2
    yield from _small(work)


def _small(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Shortest rows and lower ranks, for what is left."""
    shortest = replace(work, micro_batch=1, max_length=min(work.max_length, SHORTEST))
    rank = work.adapters.rank // 2
    while rank >= LEAST_RANK:
        adapters = replace(work.adapters, rank=rank)
        changed = replace(shortest, adapters=adapters, optimizer="paged_adamw_8bit")
        yield f"adapter.rank={rank}, data.max_length={shortest.max_length} and optim.kind=paged_adamw_8bit", changed
        rank //= 2
