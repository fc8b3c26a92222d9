"""The memory plan: bytes by component and phase against a budget, and what other ways to train would need."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.adapters import Adapter
from qlora.memory.planner.breakdown import Components, host_bytes, phases_of
from qlora.memory.planner.cost_model import seconds
from qlora.memory.planner.export_and_disk import disk_bytes, export_bytes
from qlora.memory.planner.kept_bytes import KeptBytes
from qlora.memory.planner.overhead import UNTRACKED
from qlora.memory.planner.workload import AdapterSizes, WaitingAdapters, Workload
from qlora.quant import Quant, build_quantizer
from qlora.utils.machine import gib_or_mib

DISK = {
    "base": "base model", "kept_base": "its quantized copy", "run": "run folder", "merged": "merged model",
}  # fmt: skip
COMPARED = {
    "full_finetune_bytes": "full fine-tuning",
    "lora_16bit_bytes": "16-bit LoRA",
    "qlora_bytes": "QLoRA with all layers recomputed",
}
FULL_BYTES = 16  # per weight of full fine-tuning: weight and gradient in 16 bit, float32 master weight and two moments


@dataclass(frozen=True)
class Budget:
    """Available bytes of the GPU (on a CPU: of host memory), and of host memory; None: not known, not checked."""

    device_bytes: int
    host_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """Predicted bytes by phase and component, and the budget."""

    work: Workload
    budget: Budget
    phases: Mapping[str, Mapping[str, int]]  # phase -> component -> bytes
    host_bytes: int
    checkpoints: int = 0  # that the run keeps on disk
    micro_batches: int = 1  # of one step, on each rank
    advice: str = ""  # if it does not fit: why, and what would fit

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def owners(self) -> Mapping[str, int]:
        """Bytes by component at the peak, under the name that they have in JSON."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        """Bytes of the largest phase."""
        return sum(self.owners.values())

    @property
    def allocated_bytes(self) -> int:
        """The part of the peak that `torch.cuda.max_memory_allocated` counts."""
        return max(
            sum(size for name, size in components.items() if name not in UNTRACKED)
            for components in self.phases.values()
        )

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a step on the reference device (cost_model.py): to compare plans, not a promise."""
        return round(self.micro_batches * seconds(self.work), 2)

    @property
    def fits(self) -> bool:
        """Whether it fits the GPU and host memory."""
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak_bytes <= self.budget.device_bytes

    @property
    def fits_host(self) -> bool:
        """Whether host memory is sufficient; true if its size is not known."""
        return self.budget.host_bytes is None or self.host_bytes <= self.budget.host_bytes

    def __str__(self) -> str:
        return format_plan(self)

    def as_json(self) -> dict[str, Any]:
        """The object of `plan --json`."""
        work = self.work
        return {
            "model": work.shapes.name,
            "parameters": work.shapes.parameters,
            "trainable_parameters": work.adapters.values,
            "gpu_bytes": self.budget.device_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "allocated_bytes": self.allocated_bytes,
            "owners": dict(self.owners),
            "phases": {phase: sum(components.values()) for phase, components in self.phases.items()},
            "fits": self.fits,
            "advice": self.advice,
            "choice": {
                "recompute": _layers_as_word(work.recomputed, work.shapes.layers),
                "offload_activations": work.offloaded > 0,
                "offloaded_layers": work.offloaded,
                "weights": work.weights,
                "embedding": "host" if work.embedding_on_host else "device",
                "resident_layers": work.shapes.layers - work.streamed,
                "micro_batch": work.micro_batch,
            },
            "cards": work.processes,
            "distributed": strategy_of(work),
            "host_bytes": self.host_bytes,
            "step_seconds": self.step_seconds,
            "export_bytes": export_bytes(work),
            "disk": disk_bytes(work, self.checkpoints),
            "compare": compare(work),
        }


def plan(work: Workload, budget: Budget) -> Plan:
    """The plan of `work` with its settings unchanged, whether it fits or not."""
    phases = phases_of(work)
    return Plan(work, budget, phases, _peak(phases) if work.device == "cpu" else host_bytes(work))


def strategy_of(work: Workload) -> str:
    """The strategy, as in distributed.kind."""
    return "fsdp" if work.sharded else "ddp" if work.processes > 1 else "single"


def compare(work: Workload) -> dict[str, int]:
    """The peaks of full fine-tuning, 16-bit LoRA and QLoRA on one GPU with the same batch, all layers recomputed."""
    default, dense = build_quantizer(Quant()), build_quantizer(Quant(kind="dense"))
    one_gpu = replace(work, processes=1, sharded=False, waiting=WaitingAdapters())
    resident = replace(one_gpu, recompute=None, offload=0, weights="resident")
    qlora = replace(resident, quantizer=default if work.quantizer == dense else work.quantizer)
    if work.adapters.kind == "full":
        adapter = Adapter()
        qlora = replace(qlora, adapters=AdapterSizes(work.shapes.matrices, adapter.kind, adapter.rank, dropout=False))
    lora = replace(qlora, quantizer=dense, dtype_bytes=2, kept=KeptBytes())
    no_adapters = replace(lora, adapters=AdapterSizes((), kind="lora", rank=0, dropout=False))
    full = _peak(phases_of(no_adapters)) + (FULL_BYTES - 2) * work.shapes.parameters
    return {
        "full_finetune_bytes": full,
        "lora_16bit_bytes": _peak(phases_of(lora)),
        "qlora_bytes": _peak(phases_of(qlora)),
    }


def _peak(phases: Mapping[str, Components]) -> int:
    return max(sum(components.values()) for components in phases.values())


def _layers_as_word(layers: int, total: int) -> int | str:
    """`all`, `none`, or the number, as in memory.recompute."""
    return {total: "all", 0: "none"}.get(layers, layers)


def format_plan(plan: Plan) -> str:
    """The plan as text: components by size, phases, the choice, and what other ways to train would need."""
    values = plan.as_json()
    components = sorted(values["owners"].items(), key=lambda item: -item[1])
    lines = [
        f"{values['model']}: {values['parameters']:,} parameters, {values['trainable_parameters']:,} of them trainable",
        *(f"  {name.replace('_', ' '):26}{gib_or_mib(size):>12}" for name, size in components if size),
        f"  {'peak, ' + values['peak_phase']:26}{gib_or_mib(values['peak_bytes']):>12}"
        f"  of {gib_or_mib(values['gpu_bytes'])}",
        "  phases: " + ", ".join(f"{name} {gib_or_mib(size)}" for name, size in values["phases"].items()),
        f"  {'host memory':26}{gib_or_mib(values['host_bytes']):>12}",
        f"  {'merged export':26}{gib_or_mib(values['export_bytes']):>12}",
        "  disk: " + ", ".join(f"{DISK[name]} {gib_or_mib(size)}" for name, size in values["disk"].items()),
        f"{plan_summary(plan)}, micro-batch {values['choice']['micro_batch']}",
        *_step_line(plan),
        "for comparison: "
        + ", ".join(f"{label} {gib_or_mib(values['compare'][key])}" for key, label in COMPARED.items()),
        "fits (predicted)" if values["fits"] else f"does not fit: {values['advice']}",
    ]
    return "\n".join(lines)


def _step_line(plan: Plan) -> list[str]:
    """The predicted seconds of a step on a GPU; none for a CPU, whose speed is not modeled."""
    if plan.work.device == "cpu":
        return []
    parts = f"{plan.micro_batches} x {seconds(plan.work):.1f} s" if plan.micro_batches > 1 else "one micro-batch"
    return [f"a step on an RTX 4090: {plan.step_seconds:.1f} s, {parts} (predicted)"]


def plan_summary(plan: Plan) -> str:
    """The choice in half a line: `20 of 32 layers recompute, 29 offload activations, weights resident`."""
    work, layers = plan.work, plan.work.shapes.layers
    offloaded = f", {work.offloaded} offload activations" if work.offloaded else ""
    weights = f"{work.streamed} layers stream from host memory" if work.streamed else "weights resident"
    embedding = ", embedding in host memory" if work.embedding_on_host else ""
    sharded = f", base model sharded over {work.processes} processes" if work.sharded else ""
    return f"{work.recomputed} of {layers} layers recompute{offloaded}, {weights}{embedding}{sharded}"
