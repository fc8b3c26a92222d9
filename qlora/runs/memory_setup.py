"""The memory plan carried out: a base loaded where it says, layers arranged as it says."""

from collections.abc import Callable

import torch
from torch import nn

from qlora.model.new_tokens import grow
from qlora.model.load_base import Base, load
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError
from qlora.memory.malloc import return_freed_memory
from qlora.memory.planner.search import UserChoices, next_smaller
from qlora.memory.copy_stream import CopyStream
from qlora.memory.activation_offload import ActivationOffloader
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.activation_recompute import decoder_layers, recompute
from qlora.memory.weight_streaming import WeightStreamer, embed_on_host, streamed_layers
from qlora.memory.planner.workload import Workload
from qlora.recipe.planning import here, plan_of
from qlora.quant import build as build_quantizer
from qlora.utils.progress import ProgressReporter
from qlora.recipe.recipe import Recipe

Say = Callable[[str], None]


def load_base(
    recipe: Recipe,
    device: torch.device,
    plan: Plan | None,
    say: Say = lambda text: None,
    processes: Processes | None = None,
) -> Base:
    """The base of a recipe: resident on `device`, or with layers that stream to it as planned.

    Without a plan the recipe's own word counts: then `stream` streams every layer. `processes` read it together.
    """
    streams = plan.work.weights == "stream" if plan else recipe.memory.weights == "stream"
    shares = processes is not None and processes.shards  # then a streamed layer's share waits in main memory
    stays = _on_host(plan.work) if plan and streams else _everything if shares and streams else _nothing
    return_freed_memory()  # what reading frees would stay in the C library's heaps
    told = ProgressReporter(say, "reading the base", "bytes")
    base = load(recipe.model, build_quantizer(recipe.quant), device, stays, told, processes)
    for note in base.notes:
        say(note)
    if recipe.adapter.new_tokens:
        grow(base.model, base.tokenizer, recipe.adapter.new_tokens)
    if streams and not shares:
        WeightStreamer(base.model, plan.work.resident_layers if plan else 0, CopyStream(device))
    if plan.work.embeds_on_host if plan else streams and not shares:
        embed_on_host(base.model, device)
    return base


def plan_here(recipe: Recipe) -> Plan | None:
    """The plan for a finished run on this machine, whether it fits or not; None if its shapes are not known."""
    try:
        return plan_of(recipe, here())
    except BaseModelError:
        return None


class MemoryFallback:
    """How a model's layers are arranged, and the ways down when the device runs out of memory."""

    def __init__(self, model: nn.Module, work: Workload, fixed: UserChoices, device: torch.device) -> None:
        """Let every layer keep, recompute or park its activations as `work` says."""
        self.model, self.work, self.fixed, self.device = model, work, fixed, device
        self._arrange()

    def step_down(self) -> str | None:
        """Take less of the device from now on; says how. None: what is left the user has set."""
        less = next_smaller(self.work, self.fixed)
        if less is None:
            return None
        self.work = less
        self._arrange()
        return f"from here on {less.recomputed} of {less.shapes.layers} layers recompute, {less.parked} park"

    def _arrange(self) -> None:
        work = self.work
        recompute(self.model, work.recompute, ActivationOffloader(work.parked, CopyStream(self.device)) if work.parked else None)


def arrange_unplanned(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """The same by the recipe's own word, for a model without a plan: all layers recompute unless it says otherwise."""
    words = {"auto": None, "all": None, "none": 0}
    wanted = recipe.memory.recompute
    layers = words[wanted] if isinstance(wanted, str) else wanted
    parks = recipe.memory.offload_activations is True
    recompute(model, layers, ActivationOffloader(len(decoder_layers(model)) - 1, CopyStream(device)) if parks else None)


def _everything(path: str) -> bool:
    return True


def _nothing(path: str) -> bool:
    return False


def _on_host(work: Workload) -> Callable[[str], bool]:
    """Whether the module at a path belongs to a layer that streams."""
    shapes = work.shapes
    prefixes = tuple(f"{shapes.layers_path}.{each}." for each in streamed_layers(shapes.layers, work.resident_layers))
    return lambda path: path.startswith(prefixes)
