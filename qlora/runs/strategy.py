"""Which strategy a run takes: the recipe's word, the launcher's, and the plan's where they leave it open."""

from pathlib import Path

from qlora.distributed import STRATEGIES
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError, InputError
from qlora.recipe.planning import better, here, needs_whole, plans_of
from qlora.recipe.recipe import Recipe


def open_processes(recipe: Recipe) -> Processes:
    """The processes of a run under its strategy. InputError where recipe and launcher contradict each other."""
    kind = recipe.distributed.kind
    if kind == "single" and Processes.launched() > 1:
        raise InputError("distributed.kind: single, but the launcher started several processes. Use auto or ddp.")
    if kind == "ddp" and Processes.launched_for_shares():
        raise InputError("distributed.kind: ddp, but accelerate was told to use FSDP. Use auto or fsdp, or ddp.yaml.")
    whole = needs_whole(recipe)
    if kind == "auto":
        kind = _left_open(recipe, whole)
    if kind == "fsdp" and whole:
        raise InputError(f"distributed.kind: fsdp shares the base out; {whole} needs it whole. Use ddp.")
    strategy: Processes = STRATEGIES[kind](recipe.train.report_to, Path(recipe.train.output))
    return strategy


def _left_open(recipe: Recipe, whole: str | None) -> str:
    """What `auto` means: all processes decide alike, and share the base as soon as one card can't hold it."""
    if Processes.launched() == 1:
        return "single"
    if Processes.launched_for_shares():
        return "fsdp"
    together = Processes()
    try:
        wanted = "ddp" if whole else better(plans_of(recipe, here(together.world)))
    except BaseModelError:  # whoever does not know the shapes takes what needs no plan
        wanted = "ddp"
    return "fsdp" if together.any(wanted == "fsdp") else "ddp"
