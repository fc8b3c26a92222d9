"""Bytes by owner from shapes alone: every phase of a run, its peak, and whether that fits a budget.

What is alive together is added up, what is not is compared: the loss, a layer's backward and the optimiser's update never
meet. Formulas and their sources: activations.py for what a layer keeps, this page for everything else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlora.memory.activations import (
    backward_bytes,
    forward_bytes,
    head_bytes,
    kept_bytes,
    logits_bytes,
    recompute_bytes,
)
from qlora.memory.work import Adapters, Storage, Work

Owners = dict[str, int]

OWNERS = (
    "packed_base", "embeddings", "head", "norms", "vision", "adapters", "gradients", "optimizer", "boundaries",
    "kept_activations", "layer_working_set", "logits_chunk", "dequantisation_buffer", "stream_buffers",
    "device_context", "runtime", "fragmentation_reserve",
)  # fmt: skip
OUTSIDE = ("device_context", "runtime", "fragmentation_reserve")  # not counted by torch's allocator
CONTEXT_BYTES = 600_000_000  # a CUDA context with its modules and cuBLAS workspaces: 0.4 to 0.7 GB
NCCL_BYTES = 300_000_000  # its buffers: 0.2 to 0.5 GB
RUNTIME_BYTES = 480 * 2**20  # a process with torch, transformers, bitsandbytes, datasets: 461 MiB measured on Linux
FRAGMENTATION = 0.04  # of what comes and goes: 2 to 4 % with expandable segments
FULL_BYTES = 16  # a weight of full fine-tuning: 2 + 2 in 16 bit with its gradient, float32 master and two moments 12


@dataclass(frozen=True)
class Budget:
    """What there is: bytes of the card (on a CPU: main memory) and of main memory; None: not known, not checked."""

    device_bytes: int
    host_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """Where every byte goes, by phase, against a budget."""

    work: Work
    budget: Budget
    phases: Mapping[str, Mapping[str, int]]  # phase -> owner -> bytes
    host_bytes: int
    advice: str = ""  # when it does not fit: why, and what would make it fit
    compare: Mapping[str, int] = field(default_factory=dict)

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
                "offload_activations": work.offload,
                "weights": work.weights,
                "resident_layers": work.shapes.layers - work.streamed,
                "micro_batch": work.micro_batch,
            },
            "host_bytes": self.host_bytes,
            "compare": dict(self.compare or compare(work)),
        }


def plan(work: Work, budget: Budget, advice: str = "") -> Plan:
    """The plan of `work` exactly as it is set, whether it fits or not."""
    phases = {name: _whole(work, owners) for name, owners in _phases(work).items()}
    device = max(sum(owners.values()) for owners in phases.values())
    return Plan(work, budget, phases, device if work.device == "cpu" else _host_bytes(work), advice)


def compare(work: Work) -> dict[str, int]:
    """What full fine-tuning, 16-bit LoRA and QLoRA need on the card for the same rows, all layers recomputed."""
    same = replace(work, recompute=None, offload=False, weights="resident", processes=1)
    quantised = same if work.storage.kind != "dense" else replace(same, storage=Storage())
    dense = replace(same, storage=Storage("dense"), dtype_bytes=2)
    bare = replace(dense, adapters=Adapters(()))
    full = _peak(bare) + (FULL_BYTES - 2) * work.shapes.parameters
    return {"full_finetune_bytes": full, "lora_16bit_bytes": _peak(dense), "qlora_bytes": _peak(quantised)}


def _peak(work: Work) -> int:
    return max(sum(_whole(work, owners).values()) for owners in _phases(work).values())


def _phases(work: Work) -> dict[str, Owners]:
    """Each phase's owners, what lies outside the allocator left out."""
    frozen, layers, n = _frozen(work), work.shapes.layers, work.recomputed
    learning = frozen | {"adapters": 4 * work.adapters.values} | _moments(work, paged=False)
    training = learning | {"gradients": _gradient_bytes(work)}
    waiting = {"boundaries": _boundaries(work, n), "kept_activations": (layers - n) * kept_bytes(work)}
    rebuilt = {"dequantisation_buffer": _rebuilt(work), "stream_buffers": _stream_buffers(work)}
    forward = {"boundaries": 2 * _boundary(work), "layer_working_set": forward_bytes(work) + head_bytes(work)}
    backward = _backward(work, waiting)
    return {
        "load": frozen | {"dequantisation_buffer": _largest(work)},
        "loss": training | waiting | {"layer_working_set": head_bytes(work), "logits_chunk": logits_bytes(work)},
        "backward": training | backward | rebuilt,
        "update": training | _moments(work, paged=True),
        "evaluation": learning | forward | rebuilt | {"logits_chunk": logits_bytes(work)},
        "save": learning,
    }


def _backward(work: Work, waiting: Owners) -> Owners:
    """Kept layers go first, and are gone when the first recomputed one comes; `waiting` as the loss leaves it."""
    kept = waiting["kept_activations"]
    again = recompute_bytes(work) if work.recomputed else 0
    inside = {"layer_working_set": backward_bytes(work)}
    if again <= kept:
        return waiting | inside
    return waiting | {"kept_activations": 0, "layer_working_set": again + inside["layer_working_set"]}


def _frozen(work: Work) -> Owners:
    """What never changes."""
    shapes, b = work.shapes, work.dtype_bytes
    streaming = work.weights == "stream"
    resident = shapes.layers - work.streamed
    return {
        "packed_base": resident * work.layer_bytes,
        # While layers stream, rows of the embedding are gathered in main memory; a tied one is needed as the head.
        "embeddings": 0 if streaming and not shapes.tied else shapes.embedding * b,
        "head": shapes.head * b,
        "norms": (shapes.norms + shapes.biases) * b,
        "vision": shapes.vision * b,
    }


def _moments(work: Work, paged: bool) -> Owners:
    """AdamW's two moments; paged ones give way to activations, so they count in the update alone."""
    away = work.optimizer.startswith("paged") and work.device == "cuda" and not paged
    return {"optimizer": 0 if away else moment_bytes(work)}


def moment_bytes(work: Work) -> int:
    """Bytes of AdamW's moments: 8 a value, or 2 and an absmax of 4 for every 256."""
    values = work.adapters.values
    return 2 * values + 8 * -(-values // 256) if "8bit" in work.optimizer else 8 * values


def _gradient_bytes(work: Work) -> int:
    """float32 gradients; with several processes their exchange buckets as well."""
    return (8 if work.processes > 1 else 4) * work.adapters.values


def _boundary(work: Work) -> int:
    """The hidden state between two layers."""
    return work.tokens * work.shapes.hidden * work.dtype_bytes


def _boundaries(work: Work, layers: int) -> int:
    """The inputs of `layers` recomputed layers; offloaded, only two are on the device."""
    return (min(2, layers) if work.offload else layers) * _boundary(work)


def _largest(work: Work) -> int:
    """The widest matrix in the compute dtype, as it is quantised."""
    return max(each.weights for each in work.shapes.block) * work.dtype_bytes


def _rebuilt(work: Work) -> int:
    """The widest matrix rebuilt, with its absmax; a dense one in its own dtype is used as it lies."""
    widest = max(each.weights for each in work.shapes.block)
    return 0 if work.storage.kind == "dense" else widest * work.dtype_bytes + work.storage.scratch_bytes(widest)


def _stream_buffers(work: Work) -> int:
    """Two layers' packed matrices: one in use, one on its way."""
    return 2 * work.layer_bytes if work.streamed else 0


def _whole(work: Work, owners: Owners) -> Owners:
    """All owners in their order, with what lies outside the allocator."""
    cuda = work.device == "cuda"
    lasting = ("packed_base", "embeddings", "head", "norms", "vision", "adapters", "optimizer", "gradients")
    passing = sum(size for owner, size in owners.items() if owner not in lasting)
    outside = {
        "device_context": (CONTEXT_BYTES + (NCCL_BYTES if work.processes > 1 else 0)) if cuda else 0,
        "runtime": 0 if cuda else RUNTIME_BYTES,
        "fragmentation_reserve": int(FRAGMENTATION * passing),
    }
    return {owner: (owners | outside).get(owner, 0) for owner in OWNERS}


def _host_bytes(work: Work) -> int:
    """Main memory of a process that trains on a card: itself, the streamed layers, what is offloaded, one tensor."""
    shapes, b = work.shapes, work.dtype_bytes
    embeddings = shapes.embedding * b if work.weights == "stream" and not shapes.tied else 0
    away = work.recomputed * _boundary(work) if work.offload else 0
    reading = 2 * max(shapes.embedding, *(each.weights for each in shapes.block))
    return RUNTIME_BYTES + work.streamed * work.layer_bytes + embeddings + max(away, reading)


def _layers_in_words(layers: int, of: int) -> int | str:
    """`all`, `none`, or how many, as a recipe says it."""
    return {of: "all", 0: "none"}.get(layers, layers)
