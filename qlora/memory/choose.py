"""The settings that fit a budget and run fastest in it; and when none do, what would make it fit.

Keeping activations is faster than recomputing them, resident weights are never slower than streamed ones, and what
waits in host memory costs transfers: the first way in that order that fits is taken. What the user set stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora.memory import Memory
from qlora.memory.advice import How, advise
from qlora.memory.plan import Budget, Plan, plan
from qlora.memory.work import Weights, Work

EVERYTHING = frozenset({"offload", "stream"})  # what may be planned; a trainer may be able to do less


@dataclass(frozen=True)
class Fixed:
    """What the user set; None leaves it to the plan."""

    recompute: int | None = None  # layers
    offload: bool | None = None
    weights: Weights | None = None


def fixed_by(section: Memory, layers: int) -> Fixed:
    """What a recipe's memory section sets for a model of so many decoder layers."""
    words = {"auto": None, "all": layers, "none": 0}
    recompute = words[section.recompute] if isinstance(section.recompute, str) else section.recompute
    return Fixed(
        recompute,
        None if section.offload_activations == "auto" else bool(section.offload_activations),
        None if section.weights == "auto" else section.weights,
    )


def choose(work: Work, budget: Budget, fixed: Fixed | None = None, executable: frozenset[str] = EVERYTHING) -> Plan:
    """The fastest plan of `work` that fits the budget; if none does, the one nearest to it, with advice.

    `executable`: of `offload` and `stream`, what the trainer can do; the rest is never chosen by itself.
    """
    fixed = fixed or Fixed()
    found = _best(work, budget, fixed, executable)
    if found.fits:
        return found

    def fits(other: Work, how: How) -> bool:
        free, able = Fixed(), executable if how == "auto" else EVERYTHING
        return _best(other, budget, *((fixed, executable) if how == "as set" else (free, able))).fits

    return replace(found, advice=advise(found, fits))


def _best(work: Work, budget: Budget, fixed: Fixed, executable: frozenset[str]) -> Plan:
    """The first of the ways that fits; else the nearest: the least on the card, or if that fits, in main memory."""
    plans: list[Plan] = []
    for way in _ways(work, fixed, executable):
        plans.append(plan(way, budget))
        if plans[-1].fits:
            return plans[-1]
    return min(plans, key=lambda each: (0, each.host_bytes) if each.fits_device else (1, each.peak_bytes))


def _ways(work: Work, fixed: Fixed, executable: frozenset[str]) -> Iterator[Work]:
    """Every way to run `work`, fastest first."""
    elsewhere = work.device != "cpu"  # a CPU run has no other memory to move to
    offloads = (
        [fixed.offload] if fixed.offload is not None else [False, True][: 1 + (elsewhere and "offload" in executable)]
    )
    weights: list[Weights] = ["resident", "stream"] if elsewhere and "stream" in executable else ["resident"]
    for held in [fixed.weights] if fixed.weights else weights:
        for offload in offloads:
            way = replace(work, offload=offload, weights=held)
            yield from _recomputing(way, fixed) if held == "resident" else _streaming(way, fixed)


def _recomputing(work: Work, fixed: Fixed) -> Iterator[Work]:
    """Resident weights: as few layers as possible recompute."""
    layers = work.shapes.layers
    for recompute in range(layers + 1) if fixed.recompute is None else [fixed.recompute]:
        yield replace(work, recompute=recompute)


def _streaming(work: Work, fixed: Fixed) -> Iterator[Work]:
    """Streamed weights: as many layers as possible stay, and all recompute."""
    layers = work.shapes.layers
    recompute = layers if fixed.recompute is None else fixed.recompute
    for resident in range(layers - 1, -1, -1):
        yield replace(work, recompute=recompute, resident_layers=resident)
