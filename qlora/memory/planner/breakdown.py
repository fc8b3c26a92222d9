"""Bytes by owner in every phase of a run: what stands, what trains, what waits for backward, what passes.

What is alive together is added up, what is not is compared: the loss, a layer's backward and the update never meet.
"""

from typing import NamedTuple

from qlora.memory.planner.activations import (
    backward_bytes,
    forward_bytes,
    head_bytes,
    kept_bytes,
    logits_bytes,
    recompute_bytes,
    widest_bytes,
)
from qlora.memory.planner.cost_model import boundary_bytes, parked_bytes
from qlora.memory.planner.workload import Workload

Owners = dict[str, int]

LASTING = ("packed_base", "embeddings", "head", "norms", "vision", "adapters", "gradients", "optimizer")
PASSING = (
    "boundaries", "kept_activations", "layer_working_set", "logits_chunk", "dequantisation_buffer", "stream_buffers",
    "gathered",
)  # fmt: skip
OUTSIDE = ("device_context", "runtime", "fragmentation_reserve")  # not counted by torch's allocator
OWNERS = LASTING + PASSING + OUTSIDE

CONTEXT_BYTES = 600_000_000  # a CUDA context with its modules and cuBLAS workspaces: 0.4 to 0.7 GB
IN_FLIGHT = 2  # layers whose parked tensors, or whose packed weights, are on the device at a time
HOSTED_PIECE_BYTES = 32 * 2**20  # both moments of a piece of hosted_adamw
COPIES = 3  # of the moments while a checkpoint is written: out of the optimiser, as bytes, with a header
GATHERED = 3  # layers of a sharded base that are whole at a time: in use, on its way, and as it arrived
BUCKET_BYTES = 25 * 2**20  # of gradients that DDP exchanges at a time
NCCL_BYTES = 300_000_000  # its buffers: 0.2 to 0.5 GB
RUNTIME_BYTES = 520 * 2**20  # all libraries, and a step of next to nothing: 497 MiB measured on Linux
# Of what comes and goes. CUDA: 2 to 4 % with expandable segments. CPU: glibc's heap, which allocator.py keeps; its
# aligned allocations seldom fit what was freed just before. Fitted to results/cpu_peaks.json.
FRAGMENTATION = {"cuda": 0.04, "cpu": 0.6}
HOLES = 2.1  # on a CPU, of what recomputing takes: boundaries stay where the tensors between them were


def phases_of(work: Workload) -> dict[str, Owners]:
    """Bytes by owner, all owners in their order, for load, loss, backward, update, evaluation and save."""
    return {phase: _whole(work, owners) for phase, owners in _phases(work).items()}


def host_bytes(work: Workload) -> int:
    """Main memory of a process that trains on a card: itself, the streamed layers, what is offloaded, one tensor."""
    shapes, b = work.shapes, work.dtype_bytes
    embeddings = shapes.embedding * b if work.embeds_on_host else 0
    reading = 2 * max(shapes.embedding, *(each.weights for each in shapes.block))
    hosted = work.optimizer.startswith("hosted")
    moments = work.beside.host_moments + (moment_bytes(work.adapters.values, work.optimizer) if hosted else 0)
    saving = COPIES * moment_bytes(work.adapters.values, work.optimizer) if work.adapters.kind == "full" else 0
    streamed = _shared(work.streamed * work.layer_bytes, work)
    return RUNTIME_BYTES + streamed + embeddings + moments + max(parked_bytes(work), reading, saving)


def standing_bytes(work: Workload) -> int:
    """What stands in the device's memory while a trained model is used: the base and its adapters."""
    return sum(_frozen(work).values()) + work.adapters.held_bytes + _stream_buffers(work)


def outside_bytes(work: Workload, passing: int) -> int:
    """What lies outside the allocator while so many bytes come and go."""
    return sum(_outside(work, passing).values())


def _phases(work: Workload) -> dict[str, Owners]:
    """Each phase's owners that are not zero, what lies outside the allocator left out."""
    frozen, whole = _frozen(work), _whole_bytes(work)
    held = {"adapters": work.adapters.held_bytes + work.beside.adapters}
    learning = frozen | held | _moments(work, updating=False)
    training = learning | {"gradients": _gradient_bytes(work)}
    stay = work.shapes.layers - max(work.recomputed, work.parked)
    waiting = {"boundaries": _boundaries(work), "kept_activations": stay * kept_bytes(work)}
    rebuilt = {"dequantisation_buffer": max(_rebuilt(work), whole.inside), "stream_buffers": _stream_buffers(work)}
    forward = {"boundaries": 2 * boundary_bytes(work), "layer_working_set": forward_bytes(work) + head_bytes(work)}
    backward = _backward(work, waiting)
    gathered, scored = _gathered(work), {"logits_chunk": logits_bytes(work)}
    loss = {"layer_working_set": head_bytes(work), "dequantisation_buffer": whole.head, "gathered": gathered["ends"]}
    shown = max(gathered["ends"], gathered["layers"])
    return {
        "load": frozen | {"dequantisation_buffer": widest_bytes(work), "gathered": gathered["load"]},
        "loss": training | waiting | loss | scored,
        "backward": training | backward | rebuilt | {"gathered": gathered["layers"]},
        "update": training | _moments(work, updating=True),
        "evaluation": learning | forward | rebuilt | {"gathered": shown} | scored,
        "save": learning | _saving(work),
    }


class _Whole(NamedTuple):
    """What a module that trains whole needs while it is used: its cast copy, and its gradient on the way."""

    inside: int  # a layer's widest matrix, where they train
    head: int


def _whole_bytes(work: Workload) -> _Whole:
    """A copy in the compute dtype where that is not float32, the product in that dtype, and its float32 form."""
    each = 4 if work.dtype_bytes == 4 else 2 * work.dtype_bytes + 4
    inside = each * widest_bytes(work) // work.dtype_bytes if work.adapters.kind == "full" else 0
    return _Whole(inside, each * work.shapes.embedding if work.adapters.whole_head else 0)


def _gathered(work: Workload) -> Owners:
    """What of a shared base is whole on a process: while it loads, around an end of the model, in its layers.

    Whatever is gathered arrives in one buffer and is then laid out as it was: for a moment it is there twice.
    """
    shapes, b = work.shapes, work.dtype_bytes
    layer = work.layer_bytes + (shapes.norms + shapes.biases) * b // shapes.layers
    ends = max(shapes.embedding, shapes.head) * b
    read = max(layer, ends) * (2 if work.sharded else 1) if work.processes > 1 or work.sharded else 0
    if not work.sharded:
        return {"load": read, "ends": 0, "layers": 0}
    return {"load": read, "ends": 0 if shapes.tied else 2 * ends, "layers": min(GATHERED, shapes.layers) * layer}


def _shared(size: int, work: Workload) -> int:
    """A process's part of so many frozen bytes."""
    return -(-size // work.share)


def _backward(work: Workload, waiting: Owners) -> Owners:
    """Kept layers go first, then kept ones from the host, then recomputed ones; `waiting` as the loss leaves it."""
    fetched = min(IN_FLIGHT, max(0, work.parked - work.recomputed)) * kept_bytes(work)
    kept = max(waiting["kept_activations"], fetched)
    again = recompute_bytes(work) if work.recomputed else 0
    inside = {"layer_working_set": backward_bytes(work)}
    if again <= kept:
        return waiting | {"kept_activations": kept} | inside
    return waiting | {"kept_activations": 0, "layer_working_set": again + inside["layer_working_set"]}


def _frozen(work: Workload) -> Owners:
    """What never changes; where every weight trains, what stands beside the decoder."""
    shapes, b = work.shapes, work.dtype_bytes
    if work.adapters.kind == "full":
        return {"vision": shapes.vision * b}
    ends = _shared(shapes.embedding * b, work)
    # A CPU has one memory: what streams lies in it too.
    resident = shapes.layers - (work.streamed if work.device == "cuda" else 0)
    return {
        "packed_base": _shared(resident * work.layer_bytes, work),
        # Tied ends stay whole: they are needed first and last.
        "embeddings": 0 if work.embeds_on_host else shapes.embedding * b if shapes.tied else ends,
        "head": _shared(shapes.head * b, work),
        "norms": _shared((shapes.norms + shapes.biases) * b, work),
        "vision": shapes.vision * b,
    }


def _moments(work: Workload, updating: bool) -> Owners:
    """AdamW's two moments; paged ones give way to activations, so they count in the update alone, hosted ones pass."""
    size, cuda = moment_bytes(work.adapters.values, work.optimizer), work.device == "cuda"
    waiting = work.beside.moments + (0 if cuda else work.beside.host_moments)
    if work.optimizer.startswith("hosted"):
        passing = min(2 * HOSTED_PIECE_BYTES, 2 * size)
        return {"optimizer": waiting + (passing * updating if cuda else size + passing)}
    away = work.optimizer.startswith("paged") and cuda and not updating
    return {"optimizer": waiting + (0 if away else size)}


def _saving(work: Workload) -> Owners:
    """On a CPU: the moments and their copies on the way into a file, which count where every weight trains."""
    if work.adapters.kind != "full" or work.device == "cuda":
        return {}
    return {"optimizer": (1 + COPIES) * moment_bytes(work.adapters.values, work.optimizer)}


def moments_wait(optimizer: str) -> bool:
    """Whether its moments can be in main memory while others need the device: paged, or hosted."""
    return optimizer.startswith(("paged", "hosted"))


def moment_bytes(values: int, optimizer: str) -> int:
    """Bytes of AdamW's moments: 8 a value, or 2 and an absmax of 4 for every 256."""
    return 2 * values + 8 * -(-values // 256) if "8bit" in optimizer else 8 * values


def _gradient_bytes(work: Workload) -> int:
    """float32 gradients; with several processes they lie in DDP's buckets, one of which is filled at a time."""
    return 4 * work.adapters.values + (min(BUCKET_BYTES, 4 * work.adapters.values) if work.processes > 1 else 0)


def _boundaries(work: Workload) -> int:
    """The inputs of recomputed layers; of parked ones two are on the device at a time, after the others are gone."""
    parked = min(work.recomputed, work.parked)
    here = max(work.recomputed - parked, min(IN_FLIGHT, parked)) * boundary_bytes(work)
    return here + (parked_bytes(work) if work.device == "cpu" else 0)  # a CPU parks in the memory it works in


def _rebuilt(work: Workload) -> int:
    """The widest matrix rebuilt, with its absmax; a dense one in its own dtype is used as it lies."""
    scratch = work.storage.scratch_bytes(widest_bytes(work) // work.dtype_bytes)
    return 0 if work.storage.kind == "dense" else widest_bytes(work) + scratch


def _stream_buffers(work: Workload) -> int:
    """Packed matrices of two layers, or of this process's share of them: one in use, one on its way."""
    return _shared(min(IN_FLIGHT, work.streamed) * work.layer_bytes, work)


def _whole(work: Workload, owners: Owners) -> Owners:
    """All owners in their order, with what lies outside the allocator."""
    outside = _outside(work, sum(owners.get(owner, 0) for owner in PASSING))
    return {owner: (owners | outside).get(owner, 0) for owner in OWNERS}


def _outside(work: Workload, passing: int) -> Owners:
    cuda = work.device == "cuda"
    return {
        "device_context": (CONTEXT_BYTES + (NCCL_BYTES if work.processes > 1 else 0)) if cuda else 0,
        "runtime": 0 if cuda else RUNTIME_BYTES,
        "fragmentation_reserve": int(FRAGMENTATION[work.device] * passing) + bool(passing) * _holes(work),
    }


def _holes(work: Workload) -> int:
    """What recomputing leaves unused in a CPU's heap."""
    if work.device == "cuda" or not work.recomputed:
        return 0
    taken = work.recomputed * boundary_bytes(work) + recompute_bytes(work) + backward_bytes(work)
    return int(HOLES * taken)
