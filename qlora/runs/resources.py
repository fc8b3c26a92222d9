"""What a run gets, resolved once: its ranks under a strategy, the micro-batch of each rank, the memory plan."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.distributed import STRATEGIES
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError, InputError
from qlora.memory.planner.memory_plan import Plan, plan_summary
from qlora.recipe.faster_settings import faster_settings
from qlora.recipe.planning import Machine, Planner, better_strategy, disk_shortage, needs_unsharded_base, require_fit
from qlora.recipe.recipe import Recipe
from qlora.utils.devices import device_count, device_type
from qlora.utils.machine import GIB


@dataclass(frozen=True)
class Resources:
    """The answer to "what does this run get?"; `plan` is None where the planner does not know the base model."""

    processes: Processes
    micro_batches: tuple[int, ...]  # sequences of a micro-batch, by rank
    plan: Plan | None
    notes: tuple[str, ...] = ()  # what a user should read about them

    def require_fit(self) -> None:
        """DoesNotFit if the plan exceeds the memory."""
        if self.plan is not None:
            require_fit(self.plan)


def resolve_resources(recipe: Recipe, joined: Callable[[], None] = lambda: None) -> Resources:
    """Open the processes and plan their memory. `joined` is called as soon as all ranks have met.

    InputError where recipe and launcher contradict each other. The base model's config.json is read once.
    """
    planner = Planner(recipe)
    processes = open_processes(recipe, planner)
    joined()
    machine = Machine.local(processes.world_size)
    strategy = "fsdp" if processes.shards else None
    micro_batches = _micro_batches(planner, machine, strategy, processes)
    try:
        plan = planner.plan(machine, strategy, micro_batches[processes.rank])
    except BaseModelError as error:
        return Resources(
            processes, micro_batches, None, (*unused_gpus(processes.world_size), f"no memory plan: {error}")
        )
    notes = (*unused_gpus(processes.world_size), *_notes(plan, micro_batches), *faster_settings(plan, recipe))
    shortage = disk_shortage(recipe, plan)
    return Resources(processes, micro_batches, plan, (*notes, f"train.output: {shortage}") if shortage else notes)


def unplanned(recipe: Recipe) -> Resources:
    """The same without a memory plan: every rank has the recipe's micro-batch."""
    processes = open_processes(recipe)
    return Resources(processes, (recipe.train.micro_batch,) * processes.world_size, None)


def open_processes(recipe: Recipe, planner: Planner | None = None) -> Processes:
    """The processes of a run under its strategy. InputError where recipe and launcher contradict each other."""
    kind = recipe.distributed.kind
    if kind == "single" and Processes.launched_world_size() > 1:
        raise InputError("distributed.kind: single, but the launcher started several processes. Use auto or ddp.")
    if kind == "ddp" and Processes.launched_with_fsdp():
        raise InputError("distributed.kind: ddp, but accelerate was launched with FSDP. Use auto or fsdp, or ddp.yaml.")
    unsharded = needs_unsharded_base(recipe)
    if kind == "auto":
        kind = _auto_strategy(planner or Planner(recipe), unsharded)
    if kind == "fsdp" and unsharded:
        raise InputError(f"distributed.kind: fsdp shards the base model; {unsharded} needs it unsharded. Use ddp.")
    strategy: Processes = STRATEGIES[kind](recipe.train.report_to, Path(recipe.train.output))
    return strategy


def _auto_strategy(planner: Planner, unsharded: str | None) -> str:
    """What `auto` means; all ranks decide alike: FSDP as soon as the GPU of one rank can't hold the base model."""
    if Processes.launched_world_size() == 1:
        return "single"
    if Processes.launched_with_fsdp():
        return "fsdp"
    ranks = Processes()
    try:
        kind = "ddp" if unsharded else better_strategy(planner.plan_strategies(Machine.local(ranks.world_size)))
    except BaseModelError:  # DDP needs no plan
        kind = "ddp"
    return "fsdp" if ranks.any(kind == "fsdp") else "ddp"


def _micro_batches(planner: Planner, machine: Machine, strategy: str | None, processes: Processes) -> tuple[int, ...]:
    """The recipe's micro-batch for all, unless one rank's GPU holds only a smaller one while another's holds it.

    Where no GPU holds it, or one holds none at all, it stays: the plan then says what would fit.
    """
    size = planner.recipe.train.micro_batch
    equal = (size,) * processes.world_size
    if processes.world_size == 1 or size == 1:
        return equal
    largest = torch.zeros(processes.world_size, dtype=torch.long, device=processes.device)
    largest[processes.rank] = _largest_that_fits(planner, machine, strategy)
    sizes = tuple(int(size) for size in processes.sum(largest))
    return equal if max(sizes) < size or min(sizes) == 0 else sizes


def _largest_that_fits(planner: Planner, machine: Machine, strategy: str | None) -> int:
    """The largest micro-batch, up to the recipe's, that this rank's GPU holds; 0 for none.

    The recipe's own for a model whose shapes the planner does not know.
    """
    size = planner.recipe.train.micro_batch
    try:
        while size and not planner.plan(machine, strategy, size).fits:
            size //= 2
    except BaseModelError:
        return planner.recipe.train.micro_batch
    return size


def _notes(plan: Plan, micro_batches: tuple[int, ...]) -> list[str]:
    budget = plan.budget.device_bytes
    notes = [f"memory: {plan.peak_bytes / GIB:.2f} GiB predicted of {budget / GIB:.2f} GiB, {plan_summary(plan)}"]
    if len(set(micro_batches)) > 1:
        sizes = ", ".join(map(str, micro_batches))
        notes.append(f"micro-batches of {sizes} sequences by rank: some GPUs hold fewer, and take fewer of each step")
    return notes


def unused_gpus(ranks: int, gpus: int | None = None) -> tuple[str, ...]:
    """The command that uses all GPUs, where one process runs on a machine with several; `gpus`: None counts them."""
    gpus = device_count(device_type()) if gpus is None else gpus
    if ranks > 1 or gpus < 2:
        return ()
    return (f"one of {gpus} GPUs is used; for all: accelerate launch --num_processes {gpus} -m qlora train RECIPE",)
