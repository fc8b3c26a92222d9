"""Memory plans of a recipe, before a weight is read: the workload in plain values, the machine, and the search.

A recipe leaves some choices open (strategy, recompute, offload, streaming); a plan takes the fastest that fits.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from qlora.adapters import Adapter
from qlora.adapters.patterns import by_pattern, refuse_unused
from qlora.adapters.target_modules import select
from qlora.errors import DoesNotFit
from qlora.memory.planner.config_reader import read
from qlora.memory.planner.export_and_disk import disk_bytes
from qlora.memory.planner.full_modules import full_module_values, head_trains
from qlora.memory.planner.kept_bytes import kept_bytes_of
from qlora.memory.planner.memory_plan import Budget, Plan
from qlora.memory.planner.overhead import CONTEXT_BYTES
from qlora.memory.planner.search import UserChoices, choices_of, choose
from qlora.memory.planner.shapes import Shapes
from qlora.memory.planner.workload import AdapterSizes, Workload
from qlora.model.download import find_config
from qlora.quant import build_quantizer
from qlora.recipe.recipe import Recipe
from qlora.utils.byte_sizes import size_bytes
from qlora.utils.machine import gib_or_mib, host_memory_bytes
from qlora.utils.paths import free_bytes


@dataclass(frozen=True)
class Machine:
    """What a run can use: bytes of one GPU (None: it runs on the CPU), GPUs, and host memory if it is known."""

    gpu_bytes: int | None
    gpus: int = 1  # one rank each
    host_bytes: int | None = None
    local_ranks: int = 1  # ranks that share this host memory
    bfloat16: bool = True  # whether the device has it, on which `model.dtype: auto` depends

    @classmethod
    def local(cls, ranks: int = 1) -> "Machine":
        """The machine of this process: the free memory of its first GPU, or its host memory."""
        # Planning for another machine needs no torch, and starts in a tenth of the time.
        from qlora.utils.devices import has_bfloat16, memory_bytes, run_device

        device = run_device()
        memory = memory_bytes(device)
        # Asking for the free memory creates the GPU's context, which the plan counts as a component of its own.
        gpu_bytes = None if memory is None else memory[0] + CONTEXT_BYTES
        local_ranks = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return cls(gpu_bytes, ranks, host_memory_bytes(), local_ranks, has_bfloat16(device))

    @classmethod
    def described(cls, gpu: str, gpus: int = 1, ram: str | None = None) -> "Machine":
        """The machine of `qlora plan --gpu 24GiB --gpus 2 --ram 64GiB`. InputError for what is no size."""
        return cls(size_bytes(gpu), gpus, size_bytes(ram) if ram else None, gpus)

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """The device type of the model."""
        return "cpu" if self.gpu_bytes is None else "cuda"

    def budget(self, recipe: Recipe) -> Budget:
        """The recipe's own budget if it sets one, else the memory of a GPU (on a CPU: host memory)."""
        host = None if self.host_bytes is None else self.host_bytes // self.local_ranks
        device = self.gpu_bytes if self.gpu_bytes is not None else host
        return Budget(recipe.memory.budget_bytes() or device or host_memory_bytes(), host)


class Planner:
    """Plans of one recipe. The base model's config.json is read once, when the first plan is made."""

    def __init__(self, recipe: Recipe, shapes: Shapes | None = None) -> None:
        """`shapes`: of a base model whose config.json is known already."""
        self.recipe = recipe
        self._known_shapes = shapes
        self._plans: dict[tuple[Machine, int], dict[str, Plan]] = {}

    @cached_property
    def shapes(self) -> Shapes:
        """The base model's shapes. BaseModelError if its config.json can't be had or the family is not known."""
        model = self.recipe.model
        return self._known_shapes or read(find_config(model.name, model.revision), model.name)

    def require_shapes(self) -> None:
        """BaseModelError if the base model's shapes can't be had."""
        assert self.shapes

    def plan(self, machine: Machine, strategy: str | None = None, micro_batch: int | None = None) -> Plan:
        """The plan under a strategy (None: the recipe's, or the better one), whether it fits or not."""
        plans = self.plan_strategies(machine, micro_batch)
        return plans[strategy] if strategy in plans else plans[better_strategy(plans)]

    def plan_strategies(self, machine: Machine, micro_batch: int | None = None) -> dict[str, Plan]:
        """A plan for each strategy that the recipe leaves open on so many GPUs; searched once."""
        key = machine, micro_batch or self.recipe.train.micro_batch
        if key not in self._plans:
            self._plans[key] = self._search(*key)
        return self._plans[key]

    def _search(self, machine: Machine, micro_batch: int) -> dict[str, Plan]:
        recipe = self.recipe
        workload = replace(workload_of(recipe, self.shapes, machine), micro_batch=micro_batch)
        budget, choices = machine.budget(recipe), user_choices(recipe, self.shapes.layers)
        checkpoints = recipe.train.keep if recipe.train.save_every else 0
        plans = {
            kind: choose(replace(workload, sharded=kind == "fsdp"), budget, choices)
            for kind in _open_strategies(recipe, machine.gpus)
        }
        steps = -(-recipe.train.global_batch // (micro_batch * machine.gpus))
        return {kind: replace(plan, checkpoints=checkpoints, micro_batches=steps) for kind, plan in plans.items()}


def require_fit(plan: Plan) -> Plan:
    """The plan. DoesNotFit, with what would make it fit, if it exceeds its budget."""
    if not plan.fits:
        raise DoesNotFit(f"memory: {plan.advice}")
    return plan


def disk_shortage(recipe: Recipe, plan: Plan) -> str | None:
    """What a user should know if the disk of the run folder holds less than the run writes."""
    needed = disk_bytes(plan.work, plan.checkpoints)["run"]
    free = free_bytes(Path(recipe.train.output))
    if needed <= free:
        return None
    return (
        f"the run writes about {gib_or_mib(needed)}, and {gib_or_mib(free)} are free on this disk. Free some space, "
        "lower train.keep, or name a folder on another disk."
    )


def _open_strategies(recipe: Recipe, gpus: int) -> list[str]:
    kind = recipe.distributed.kind
    if gpus == 1:
        return ["fsdp" if kind == "fsdp" else "single"]
    if kind in ("ddp", "fsdp"):
        return [kind]
    return ["ddp"] if needs_unsharded_base(recipe) else ["ddp", "fsdp"]


def needs_unsharded_base(recipe: Recipe) -> str | None:
    """The setting that rules FSDP out: it trains parameters of the base model, or compiles its layers."""
    return recipe.adapter.trains_base_weights() or ("train.compile: true" if recipe.train.compile else None)


def better_strategy(plans: Mapping[str, Plan]) -> str:
    """DDP where every GPU holds the model without streaming weights; else FSDP, if at least that fits."""
    ddp, fsdp = plans.get("ddp"), plans.get("fsdp")
    if ddp is None or fsdp is None:
        return next(iter(plans))
    if ddp.fits and not ddp.work.streamed:
        return "ddp"
    return "ddp" if ddp.fits and not fsdp.fits else "fsdp"


def user_choices(recipe: Recipe, layers: int) -> UserChoices:
    """What the recipe leaves no choice about: its memory section, training of base weights, compiled layers."""
    choices = choices_of(recipe.memory, layers)
    if choices.weights is None and os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
        choices = replace(choices, weights="stream")  # set by the launcher, see recipes/accelerate/fsdp_offload.yaml
    if recipe.adapter.trains_base_weights():  # trained weights have no copy to stream from
        choices = replace(choices, weights="resident")
    if not recipe.train.compile:
        return choices
    return replace(choices, offload=bool(choices.offload), weights=choices.weights or "resident")


def workload_of(recipe: Recipe, shapes: Shapes, machine: Machine) -> Workload:
    """One rank's part of a run, as far as its memory goes."""
    dtype, quantizer = dtype_on(machine, recipe.model.dtype, shapes.dtype), build_quantizer(recipe.quant)
    return Workload(
        shapes=shapes,
        adapters=adapter_sizes(recipe.adapter, shapes),
        quantizer=quantizer,
        kept=kept_bytes_of(quantizer, shapes, dtype_bytes(dtype)),
        dtype_bytes=dtype_bytes(dtype),
        float16=dtype == "float16",
        optimizer=recipe.optim.kind,
        micro_batch=recipe.train.micro_batch,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        attention=recipe.model.attention,
        device=machine.device,
        processes=machine.gpus,
        rows=_rows(recipe, shapes),
    )


def _rows(recipe: Recipe, shapes: Shapes) -> int:
    """Padded rows of a sequence: its answers' own ones, where a pair is neither packed nor a prefix tree."""
    is_tree = recipe.model.attention == "auto" and not any(layer.recurrent for layer in shapes.kinds)
    return 2 if recipe.objective.sided_format == "preference" and not recipe.data.packing and not is_tree else 1


def adapter_sizes(section: Adapter, shapes: Shapes) -> AdapterSizes:
    """The parameters that train. AdapterError for a name or a pattern that matches no layer."""
    if section.kind == "full":
        values = shapes.parameters
        return AdapterSizes(shapes.matrices, kind="full", rank=0, dropout=False, full_values=values, head_trains=True)
    expert_rank = expert_rank_of(section, shapes)
    matrices = {matrix.path: matrix for matrix in shapes.matrices if expert_rank or not matrix.experts}
    targets = select(matrices, section.targets)
    ranks, alphas = section.rank_pattern or {}, section.alpha_pattern or {}
    refuse_unused("adapter.rank_pattern", ranks, targets)
    refuse_unused("adapter.alpha_pattern", alphas, targets)
    full_modules = full_module_values(shapes, section.save_modules)
    token_matrices = 1 if shapes.tied else 2
    token_values = len((*section.tokens, *section.new_tokens)) * shapes.hidden * token_matrices
    return AdapterSizes(
        tuple(matrices[path] for path in targets),
        kind=section.kind,
        rank=section.rank,
        expert_rank=expert_rank,
        dropout=section.dropout > 0,
        keeps_init=section.init == "pissa",
        ranks={path: rank for path in targets if (rank := by_pattern(ranks, path, 0))},
        full_values=sum(full_modules.values()) + token_values,
        head_trains=head_trains(shapes, full_modules),
    )


def expert_rank_of(section: Adapter, shapes: Shapes) -> int:
    """The rank of each expert's update: `auto` is the adapter's rank over the experts that a token visits."""
    experts = next((layer.experts for layer in shapes.kinds if layer.experts), None)
    if experts is None:
        return 0
    return max(1, section.rank // experts.per_token) if section.expert_rank == "auto" else section.expert_rank


def dtype_on(machine: Machine, dtype: str, base_dtype: str | None) -> str:
    """The compute dtype: `auto` is float32 for a base in float32, else bfloat16 where the machine has it, else float16.

    As `choose_dtype` of model/dtypes.py, without torch.
    """
    if dtype != "auto":
        return dtype
    if base_dtype in (None, "float32"):
        return "float32"
    return "bfloat16" if machine.bfloat16 else "float16"


def dtype_bytes(dtype: str) -> int:
    """Bytes of a value between two products, and of one that is not quantized: float16 is for products alone."""
    return 2 if dtype == "bfloat16" else 4
