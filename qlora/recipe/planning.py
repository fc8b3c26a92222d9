"""A recipe's memory, planned before a weight is read: its work in plain values, the budget here, and the choice."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qlora.adapters import Adapter
from qlora.adapters.patterns import by_pattern, refuse_idle
from qlora.adapters.target_modules import select
from qlora.errors import DoesNotFit
from qlora.memory import size_bytes
from qlora.memory.planner.breakdown import CONTEXT_BYTES
from qlora.memory.planner.config_reader import read
from qlora.memory.planner.full_modules import head_trains, whole_values
from qlora.memory.planner.memory_plan import Budget, Plan
from qlora.memory.planner.search import UserChoices, choose, fixed_by
from qlora.memory.planner.shapes import Shapes
from qlora.memory.planner.workload import AdapterSizes, Storage, Workload
from qlora.model.download import find_config
from qlora.recipe.recipe import Recipe


@dataclass(frozen=True)
class Machine:
    """What a run would have: a card's bytes (None: it runs on the CPU), cards, and main memory if it is known."""

    card_bytes: int | None
    cards: int = 1  # processes of the run, one for each
    host_bytes: int | None = None
    beside: int = 1  # of these processes, those that share this main memory

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where the model would be."""
        return "cpu" if self.card_bytes is None else "cuda"

    def budget(self, recipe: Recipe) -> Budget:
        """The recipe's own budget if it sets one, else what the card (on a CPU: main memory) has."""
        host = None if self.host_bytes is None else self.host_bytes // self.beside
        own = self.card_bytes if self.card_bytes is not None else host
        return Budget(recipe.memory.budget_bytes() or own or main_memory_bytes(), host)


def here(processes: int = 1) -> Machine:
    """The machine this runs on: the free memory of its first card, or its main memory."""
    import torch  # planning for another machine needs no torch, and starts in a tenth of the time

    # Asking makes the context, which the plan counts by itself.
    card = torch.cuda.mem_get_info()[0] + CONTEXT_BYTES if torch.cuda.is_available() else None
    return Machine(card, processes, main_memory_bytes(), min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def elsewhere(gpu: str, gpus: int, ram: str | None) -> Machine:
    """A machine as `qlora plan` was told."""
    return Machine(size_bytes(gpu), gpus, size_bytes(ram) if ram else None, gpus)


def main_memory_bytes() -> int:
    """All of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan_of(recipe: Recipe, machine: Machine) -> Plan:
    """The plan of a recipe on a machine. BaseModelError if the model's shapes are not known."""
    plans = plans_of(recipe, machine)
    return plans[better(plans)]


def plans_of(recipe: Recipe, machine: Machine) -> dict[str, Plan]:
    """A plan for each strategy that the recipe leaves open on so many cards."""
    return plans_for(recipe, read(find_config(recipe.model.name, recipe.model.revision), recipe.model.name), machine)


def plans_for(recipe: Recipe, shapes: Shapes, machine: Machine) -> dict[str, Plan]:
    """The same for a base of known shapes."""
    kind = recipe.distributed.kind
    several = [kind] if kind in ("ddp", "fsdp") else ["ddp"] if needs_whole(recipe) else ["ddp", "fsdp"]
    kinds = several if machine.cards > 1 else ["fsdp" if kind == "fsdp" else "single"]
    work, fixed = work_of(recipe, shapes, machine), left_open(recipe, shapes.layers)
    kept = recipe.train.keep if recipe.train.save_every else 0
    found = {each: choose(replace(work, sharded=each == "fsdp"), machine.budget(recipe), fixed) for each in kinds}
    return {kind: replace(plan, checkpoints=kept) for kind, plan in found.items()}


def needs_whole(recipe: Recipe) -> str | None:
    """The setting that rules a shared base out: what trains is part of it, or compiled layers hold it in place."""
    return recipe.adapter.of_the_base() or ("train.compile: true" if recipe.train.compile else None)


def better(plans: Mapping[str, Plan]) -> str:
    """Every card its own model where that fits without moving layers; else shares of one, if at least those fit."""
    whole, shared = plans.get("ddp"), plans.get("fsdp")
    if whole is None or shared is None:
        return next(iter(plans))
    if whole.fits and not whole.work.streamed:
        return "ddp"
    return "ddp" if whole.fits and not shared.fits else "fsdp"


def left_open(recipe: Recipe, layers: int) -> UserChoices:
    """What the recipe leaves no choice about: its memory section, what trains whole, and that of compiled layers."""
    fixed = fixed_by(recipe.memory, layers)
    if fixed.weights is None and os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
        fixed = replace(fixed, weights="stream")  # the launcher's word, see recipes/accelerate/fsdp_offload.yaml
    if recipe.adapter.of_the_base():  # it has no copy to come from
        fixed = replace(fixed, weights="resident")
    if not recipe.train.compile:
        return fixed
    return replace(fixed, offload=bool(fixed.offload), weights=fixed.weights or "resident")


def plan_under(recipe: Recipe, processes: int, kind: str | None) -> Plan:
    """The plan of a recipe for one of so many processes here under a strategy, whether it fits or not."""
    plans = plans_of(recipe, here(processes))
    return plans[kind] if kind in plans else plans[better(plans)]


def plan_run(recipe: Recipe, processes: int, kind: str | None = None) -> Plan:
    """The plan that a run obeys, under a strategy. DoesNotFit, with what would make it fit."""
    found = plan_under(recipe, processes, kind)
    if not found.fits:
        raise DoesNotFit(f"memory: {found.advice}")
    return found


def unused_cards(processes: int, cards: int | None = None) -> tuple[str, ...]:
    """What to type for more, where one process runs on a machine with several cards; `cards`: None counts them."""
    import torch

    found = torch.cuda.device_count() if cards is None else cards
    if processes > 1 or found < 2:
        return ()
    return (f"one of {found} cards is used; for all: accelerate launch --num_processes {found} -m qlora train RECIPE",)


def work_of(recipe: Recipe, shapes: Shapes, machine: Machine) -> Workload:
    """One process's share of a recipe, as far as its memory goes."""
    return Workload(
        shapes=shapes,
        adapters=adapters_of(recipe.adapter, shapes),
        storage=Storage(recipe.quant.kind, bool(recipe.quant.double), recipe.quant.block or 64),
        dtype_bytes=dtype_bytes(recipe.model.dtype, shapes.dtype),
        optimizer=recipe.optim.kind,
        micro_batch=recipe.train.micro_batch,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        attention=recipe.model.attention,
        device=machine.device,
        processes=machine.cards,
    )


def adapters_of(section: Adapter, shapes: Shapes) -> AdapterSizes:
    """What trains. AdapterError for a name or a pattern that means no layer."""
    if section.kind == "full":
        trained = shapes.parameters - shapes.vision
        return AdapterSizes(shapes.matrices, "full", rank=0, whole=trained, whole_head=True)
    named = {matrix.path: matrix for matrix in shapes.matrices}
    chosen = select(named, section.targets)
    ranks, alphas = section.rank_pattern or {}, section.alpha_pattern or {}
    refuse_idle("adapter.rank_pattern", ranks, chosen)
    refuse_idle("adapter.alpha_pattern", alphas, chosen)
    whole = whole_values(shapes, section.save_modules)
    return AdapterSizes(
        tuple(named[path] for path in chosen),
        section.kind,
        section.rank,
        section.dropout > 0,
        section.init == "pissa",
        {path: by_pattern(ranks, path, section.rank) for path in chosen} if ranks else {},
        sum(whole.values()) + len((*section.tokens, *section.new_tokens)) * shapes.hidden * (1 if shapes.tied else 2),
        head_trains(shapes, whole),
    )


def dtype_bytes(wanted: str, own: str | None) -> int:
    """Bytes of the compute dtype: `auto` is the base's own, 16 bit unless that is float32."""
    named = own if wanted == "auto" else wanted
    return 4 if named in (None, "float32") else 2
