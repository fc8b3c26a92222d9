"""Settings that would make a planned run on a GPU faster, and fit as well: named in a note, never changed."""

from collections.abc import Iterator
from dataclasses import replace

from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.search import choose, estimated_cost
from qlora.recipe.planning import user_choices
from qlora.recipe.recipe import Recipe

# Writing a matrix in 16 bits and reading it in 4, at 85 % of the 1,008 GB/s of the cost model's GPU (RTX 4090).
DEQUANTIZE_SECONDS = 2.5 / (0.85 * 1.008e12)  # of one weight, in each pass over a layer
FULL_TOKENS = 8192  # of a micro-batch: a GPU gains little from more
GAIN = 1.03  # of the predicted time of a sequence, below which a larger micro-batch is not worth a line
OPTIMIZER_COST = 1.01  # of a micro-batch: what its moments may cost in recomputed layers


def faster_settings(plan: Plan, recipe: Recipe) -> list[str]:
    """Notes on the optimizer and the micro-batch of a plan; none on a CPU, or where the plan does not fit."""
    if plan.work.device != "cuda" or not plan.fits:
        return []
    return [*_optimizer(plan, recipe), *_micro_batch(plan, recipe)]


def _optimizer(plan: Plan, recipe: Recipe) -> Iterator[str]:
    """AdamW updates all tensors in a few launches; bitsandbytes' optimizers wait for the GPU at each tensor."""
    kind = plan.work.optimizer
    if not kind.startswith("paged"):
        return
    other = _chosen(plan, recipe, optimizer="adamw")
    if other.fits and estimated_cost(other) <= OPTIMIZER_COST * estimated_cost(plan):
        yield f"optim.kind: adamw fits too, and is faster than {kind}, which waits for the GPU at every tensor"


def _micro_batch(plan: Plan, recipe: Recipe) -> Iterator[str]:
    """Each matrix is dequantized once for a micro-batch: the sequences of a larger one share that work."""
    work = plan.work
    most = min(recipe.train.global_batch // work.processes, FULL_TOKENS // work.max_length)
    best, size = plan, 2 * work.micro_batch
    while size <= most:
        other = _chosen(plan, recipe, micro_batch=size)
        if not other.fits:
            break
        best = min(best, other, key=_seconds_per_sequence)
        size *= 2
    gain = _seconds_per_sequence(plan) / _seconds_per_sequence(best)
    if gain >= GAIN:
        yield (
            f"train.micro_batch: {best.work.micro_batch} fits too, and is {gain - 1:.0%} faster than "
            f"{work.micro_batch} (predicted); the result stays the same"
        )


def _seconds_per_sequence(plan: Plan) -> float:
    """Predicted, with the dequantization of every matrix, which a micro-batch does once in each pass."""
    work = plan.work
    passes = 2 + work.recomputed / work.shapes.layers
    dequantize = passes * work.shapes.quantized * DEQUANTIZE_SECONDS
    return (estimated_cost(plan) + dequantize) / work.micro_batch


def _chosen(plan: Plan, recipe: Recipe, **changes: object) -> Plan:
    """The best plan of a changed workload under the same budget."""
    work = replace(plan.work, **changes)  # type: ignore[arg-type]
    return choose(work, plan.budget, user_choices(recipe, work.shapes.layers))
