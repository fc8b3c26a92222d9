"""What would make a plan fit: the smallest change of a recipe whose plan fits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from qlora.memory.planner.kept_bytes import KeptBytes
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.overhead import UNTRACKED
from qlora.memory.planner.workload import Workload
from qlora.quant import Keeping, Quant, build_quantizer
from qlora.utils.machine import gib

Source = Literal["user", "auto"]  # memory.* as the user set it, or left to the plan
Fits = Callable[[Workload, Source], bool]
SHORTEST = 128  # tokens of a sequence; advice goes no lower
LOWEST_RANK = 4


def advise(plan: Plan, fits: Fits) -> str:
    """Why the plan does not fit, and what would fit."""
    return f"{_reason(plan)} {_remedy(plan.work, fits)}"


def _remedy(work: Workload, fits: Fits) -> str:
    if fits(work, "auto"):
        return "What would fit: memory.recompute, memory.offload_activations and memory.weights left at auto."
    change = next((text for text, changed in _changes(work) if fits(changed, "user")), None)
    if change:
        return f"What would fit: {change}."
    return "No smaller setting of this run fits: use a smaller model, or more memory."


def _reason(plan: Plan) -> str:
    reasons = []
    if not plan.fits_device:
        memory = "GPU memory" if plan.work.device == "cuda" else "host memory"
        components = sorted(plan.owners.items(), key=lambda item: -item[1])
        largest = ", ".join(
            f"{name.replace('_', ' ')} {gib(size)}" for name, size in components[:3] if name not in UNTRACKED
        )
        reasons.append(
            f"{gib(plan.peak_bytes)} of {memory} needed, {gib(plan.budget.device_bytes)} available "
            f"(largest: {largest})."
        )
    if not plan.fits_host and plan.budget.host_bytes is not None:
        use = " to stream the frozen layers from" if plan.work.streamed else ""
        reasons.append(f"{gib(plan.host_bytes)} of host memory needed{use}, {gib(plan.budget.host_bytes)} available.")
    return " ".join(reasons)


def _changes(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Changes of a recipe as text, and the changed workload: the ones that cost least first."""
    for micro_batch in range(work.micro_batch - 1, 0, -1):
        yield f"train.micro_batch={micro_batch} (the result stays the same)", replace(work, micro_batch=micro_batch)
    if work.processes > 1 and not work.sharded:
        yield "distributed.kind=fsdp", replace(work, sharded=True)
    if work.optimizer != "paged_adamw_8bit":
        yield "optim.kind=paged_adamw_8bit", replace(work, optimizer="paged_adamw_8bit")
    one = replace(work, micro_batch=1)
    with_one = "train.micro_batch=1 and " if work.micro_batch > 1 else ""
    default, quantizer = Quant(), work.quantizer
    if isinstance(quantizer, Keeping):
        one = replace(one, quantizer=quantizer.others, kept=KeptBytes())
        yield f"{with_one}quant.keep=[]", one
    if one.quantizer != build_quantizer(default):
        changed = replace(one, quantizer=build_quantizer(default))
        yield f"{with_one}quant.kind={default.kind} with double quantization", changed
    length = work.max_length // 2
    while length >= SHORTEST:
        yield f"{with_one}data.max_length={length}", replace(one, max_length=length)
        length //= 2
    yield from _smallest(work)


def _smallest(work: Workload) -> Iterator[tuple[str, Workload]]:
    """The shortest sequences with lower ranks, if nothing else fits."""
    shortest = replace(work, micro_batch=1, max_length=min(work.max_length, SHORTEST))
    rank = work.adapters.rank // 2
    while rank >= LOWEST_RANK:
        adapters = replace(work.adapters, rank=rank)
        changed = replace(shortest, adapters=adapters, optimizer="paged_adamw_8bit")
        yield f"adapter.rank={rank}, data.max_length={shortest.max_length} and optim.kind=paged_adamw_8bit", changed
        rank //= 2
