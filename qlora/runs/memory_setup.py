"""A memory plan applied to a model: where the base model's weights are, what each layer does with its activations."""

from collections.abc import Callable

import torch
from torch import nn

from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError
from qlora.memory.activation_offload import ActivationOffloader
from qlora.memory.activation_recompute import decoder_layers, recompute
from qlora.memory.copy_stream import CopyStream
from qlora.memory.malloc import return_freed_memory
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.search import UserChoices, next_smaller
from qlora.memory.planner.workload import Workload
from qlora.memory.weight_streaming import WeightStreamer, embed_on_host, streamed_layers
from qlora.model.load_base import Base, load
from qlora.model.new_tokens import add_tokens_and_resize
from qlora.quant import build_quantizer
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe
from qlora.training.base_check import check_base
from qlora.utils.kernel_notes import take_kernel_notes
from qlora.utils.progress import ProgressReporter

Log = Callable[[str], None]


def load_base(
    recipe: Recipe,
    device: torch.device,
    plan: Plan | None,
    log: Log = lambda text: None,
    processes: Processes | None = None,
) -> Base:
    """The base model of a recipe: resident on `device`, or with layers that stream to it as planned.

    Without a plan, `memory.weights: stream` streams every layer. `processes` read the files together. Whatever the
    command, the base is compared with transformers' own class before it is used.
    """
    streams = plan.work.weights == "stream" if plan else recipe.memory.weights == "stream"
    sharded = processes is not None and processes.shards  # FSDP keeps the shard of a streamed layer in host memory
    on_host = _streamed_modules(plan.work) if plan and streams else _all_modules if sharded and streams else _no_modules
    return_freed_memory()  # what reading frees would stay in the C library's heaps
    progress = ProgressReporter(log, "reading the base model", "bytes")
    base = load(recipe.model, build_quantizer(recipe.quant), device, on_host, progress, processes)
    for note in base.notes:
        log(note)
    if recipe.adapter.new_tokens:
        add_tokens_and_resize(base.model, base.tokenizer, recipe.adapter.new_tokens)
    if streams and not sharded:
        WeightStreamer(base.model, plan.work.resident_layers if plan else 0, CopyStream(device))
    several_ranks = processes is not None and processes.world_size > 1  # DDP would move the embedding back
    if plan.work.embedding_on_host if plan else streams and not several_ranks:
        embed_on_host(base.model, device)
    check_base(base.model, log)
    for note in take_kernel_notes():  # the comparison has used the kernels of training
        log(note)
    return base


def plan_if_known(recipe: Recipe) -> Plan | None:
    """The plan of a finished run on this machine, whether it fits or not; None if the base's shapes are not known."""
    try:
        return Planner(recipe).plan(Machine.local())
    except BaseModelError:
        return None


class MemoryFallback:
    """The activation policy of each layer, and the next smaller one when the device runs out of memory."""

    def __init__(self, model: nn.Module, work: Workload, choices: UserChoices, device: torch.device) -> None:
        """Let every layer keep, recompute or offload its activations as `work` says."""
        self.model, self.work, self.choices, self.device = model, work, choices, device
        self._apply()

    def step_down(self) -> str | None:
        """Use less of the device from now on; returns how. None: the recipe sets what is left."""
        work = next_smaller(self.work, self.choices)
        if work is None:
            return None
        self.work = work
        self._apply()
        return f"from here on {work.recomputed} of {work.shapes.layers} layers recompute, {work.offloaded} offload"

    def _apply(self) -> None:
        offloaded = self.work.offloaded
        offloader = ActivationOffloader(offloaded, CopyStream(self.device)) if offloaded else None
        recompute(self.model, self.work.recompute, offloader)


def arrange_unplanned(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """The activation policies of a model without a plan: all layers recompute unless the recipe sets a number."""
    setting = recipe.memory.recompute
    layers = {"auto": None, "all": None, "none": 0}[setting] if isinstance(setting, str) else setting
    offloads = recipe.memory.offload_activations is True
    offloader = ActivationOffloader(len(decoder_layers(model)) - 1, CopyStream(device)) if offloads else None
    recompute(model, layers, offloader)


def _all_modules(path: str) -> bool:
    return True


def _no_modules(path: str) -> bool:
    return False


def _streamed_modules(work: Workload) -> Callable[[str], bool]:
    """Whether the module at a path belongs to a streamed layer."""
    shapes = work.shapes
    layers = streamed_layers(shapes.layers, work.resident_layers)
    prefixes = tuple(f"{shapes.layers_path}.{layer}." for layer in layers)
    return lambda path: path.startswith(prefixes)
