"""The plan: every byte of every phase against a budget, from shapes alone; and what other ways to train would need."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.memory.planner.breakdown import OUTSIDE, Owners, host_bytes, phases_of
from qlora.memory.planner.export_and_disk import disk_bytes, export_bytes
from qlora.memory.planner.workload import AdapterSizes, Storage, WaitingAdapters, Workload

GIB = 2**30
DISK = {"base": "the base's files", "kept_base": "kept in 4 bits", "run": "a run's folder", "merged": "a merged model"}
COMPARED = {
    "full_finetune_bytes": "full fine-tuning",
    "lora_16bit_bytes": "16-bit LoRA",
    "qlora_bytes": "QLoRA with all layers recomputed",
}
FULL_BYTES = 16  # a weight of full fine-tuning: 2 + 2 in 16 bit with its gradient, float32 master and two moments 12


@dataclass(frozen=True)
class Budget:
    """What there is: bytes of the card (on a CPU: main memory) and of main memory; None: not known, not checked."""

    device_bytes: int
    host_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """Where every byte goes, by phase, against a budget."""

    work: Workload
    budget: Budget
    phases: Mapping[str, Mapping[str, int]]  # phase -> owner -> bytes
    host_bytes: int
    checkpoints: int = 0  # that the run leaves on the disk
    advice: str = ""  # when it does not fit: why, and what would make it fit

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def owners(self) -> Mapping[str, int]:
        """Bytes by owner at the peak."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        """The most that is needed at any time."""
        return sum(self.owners.values())

    @property
    def allocated_bytes(self) -> int:
        """The part of the peak that `torch.cuda.max_memory_allocated` counts."""
        return max(sum(size for owner, size in phase.items() if owner not in OUTSIDE) for phase in self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether card and main memory hold it."""
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak_bytes <= self.budget.device_bytes

    @property
    def fits_host(self) -> bool:
        """Whether main memory holds its part; true when that is not known."""
        return self.budget.host_bytes is None or self.host_bytes <= self.budget.host_bytes

    def __str__(self) -> str:
        return table(self)

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
            "phases": {phase: sum(owners.values()) for phase, owners in self.phases.items()},
            "fits": self.fits,
            "advice": self.advice,
            "choice": {
                "recompute": _layers_in_words(work.recomputed, work.shapes.layers),
                "offload_activations": work.parked > 0,
                "offloaded_layers": work.parked,
                "weights": work.weights,
                "embedding": "host" if work.embeds_on_host else "device",
                "resident_layers": work.shapes.layers - work.streamed,
                "micro_batch": work.micro_batch,
            },
            "cards": work.processes,
            "distributed": kind_of(work),
            "host_bytes": self.host_bytes,
            "export_bytes": export_bytes(work),
            "disk": disk_bytes(work, self.checkpoints),
            "compare": compare(work),
        }


def plan(work: Workload, budget: Budget) -> Plan:
    """The plan of `work` exactly as it is set, whether it fits or not."""
    phases = phases_of(work)
    return Plan(work, budget, phases, _peak(phases) if work.device == "cpu" else host_bytes(work))


def kind_of(work: Workload) -> str:
    """How the processes share the work, as a recipe says it."""
    return "fsdp" if work.sharded else "ddp" if work.processes > 1 else "single"


def compare(work: Workload) -> dict[str, int]:
    """What full fine-tuning, 16-bit LoRA and QLoRA need on the card for the same rows, all layers recomputed."""
    alone = replace(work, processes=1, sharded=False, beside=WaitingAdapters())
    same = replace(alone, recompute=None, offloaded=0, weights="resident")
    quantised = same if work.storage.kind != "dense" else replace(same, storage=Storage())
    if work.adapters.kind == "full":
        quantised = replace(quantised, adapters=AdapterSizes(work.shapes.matrices))
    dense = replace(quantised, storage=Storage("dense"), dtype_bytes=2)
    bare = replace(dense, adapters=AdapterSizes(()))
    full = _peak(phases_of(bare)) + (FULL_BYTES - 2) * work.shapes.parameters
    return {
        "full_finetune_bytes": full,
        "lora_16bit_bytes": _peak(phases_of(dense)),
        "qlora_bytes": _peak(phases_of(quantised)),
    }


def _peak(phases: Mapping[str, Owners]) -> int:
    return max(sum(owners.values()) for owners in phases.values())


def _layers_in_words(layers: int, of: int) -> int | str:
    """`all`, `none`, or how many, as a recipe says it."""
    return {of: "all", 0: "none"}.get(layers, layers)


def table(plan: Plan) -> str:
    """The plan for people: owners by size, the phases, the choice, and what other ways of training would need."""
    found = plan.as_json()
    choice = found["choice"]
    owners = sorted(found["owners"].items(), key=lambda item: -item[1])
    lines = [
        f"{found['model']}: {found['parameters']:,} parameters, {found['trainable_parameters']:,} of them trainable",
        *(f"  {name.replace('_', ' '):26}{gib(size)}" for name, size in owners if size),
        f"  {'peak, ' + found['peak_phase']:26}{gib(found['peak_bytes'])}  of {gib(found['gpu_bytes']).strip()}",
        "  phases: " + ", ".join(f"{name} {gib(size).strip()}" for name, size in found["phases"].items()),
        f"  {'main memory':26}{gib(found['host_bytes'])}",
        f"  {'a merged export':26}{gib(found['export_bytes'])}",
        "  disk: " + ", ".join(f"{DISK[name]} {gib(size).strip()}" for name, size in found["disk"].items()),
        f"{in_words(plan)}, micro-batch {choice['micro_batch']}",
        "for comparison: "
        + ", ".join(f"{words} {gib(found['compare'][key]).strip()}" for key, words in COMPARED.items()),
        "fits (predicted)" if found["fits"] else f"does not fit: {found['advice']}",
    ]
    return "\n".join(lines)


def in_words(plan: Plan) -> str:
    """How it runs, in half a line: `recompute 20 layers of 32, 29 park in main memory, weights resident`."""
    work, layers = plan.work, plan.work.shapes.layers
    parked = f", {work.parked} park in main memory" if work.parked else ""
    weights = f"{work.streamed} layers stream from main memory" if work.streamed else "weights resident"
    embedding = ", the embedding in main memory" if work.embeds_on_host else ""
    embedding += f", the base shared by {work.processes} processes" if work.sharded else ""
    return f"{work.recomputed} of {layers} layers recompute{parked}, {weights}{embedding}"


def gib(size: int) -> str:
    """Bytes in GiB, small ones in MiB, set for a column."""
    return f"{size / GIB:8.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:8.2f} MiB"
