"""Memory of one rank by component, in every phase of a run: load, loss, backward, update, evaluation, save.

Components that are in memory at the same time are added; the peak is the largest phase. Bytes, with b of a value of the
compute dtype, T tokens of a micro-batch, H hidden and V vocabulary size, N trained values, n shards of the base:

    component              bytes                                                        phases
    packed_base            quantizer.stored_bytes of the resident layers / n            all
    embeddings, head       V H b each / n; 0 for a tied head or an embedding on the host all
    norms                  norms and biases: values * b / n                             all
    routers                routers, gates, convolutions and the like in 16 bits: values * b / n  all
    adapters               4 N; pissa keeps the initial A and B too                     all but load
    optimizer              moments on the device (optimizer_state.py)                   all but load
    gradients              4 N, with several ranks a DDP bucket more                    loss, backward, update
    boundaries             T H b for each recomputed layer; two in evaluation           loss, backward, evaluation
    kept_activations       kept_bytes for each layer that neither recomputes nor offloads   loss, backward
    layer_working_set      head_bytes / recompute_bytes + backward_bytes / forward_bytes    loss / backward / evaluation
                           and cast_bytes on a GPU                                          loss, backward
    logits_chunk           float32 logits computed at a time                            loss, evaluation
    dequantisation_buffer  the largest matrix W, and the quantizer's scratch            load, backward, evaluation
    stream_buffers         packed bytes of two streamed layers / n                      backward, evaluation
    gathered               all-gathered layers, embedding or head of a sharded base     load, loss, backward, evaluation
    device_context, runtime, fragmentation_reserve   not tensors (overhead.py)          all

The formulas of activations are in activations.py; the names are those of `qlora plan --json`.
"""

from collections.abc import Callable
from typing import NamedTuple

from qlora.memory.planner.activations import (
    backward_bytes,
    cast_bytes,
    forward_bytes,
    head_bytes,
    kept_bytes,
    logits_bytes,
    recompute_bytes,
    widest_bytes,
)
from qlora.memory.planner.cost_model import boundary_bytes, offloaded_bytes
from qlora.memory.planner.optimizer_state import checkpoint_copies, device_moments, host_moments, moment_bytes
from qlora.memory.planner.overhead import RUNTIME_BYTES, UNTRACKED, overhead
from qlora.memory.planner.shapes import Layer
from qlora.memory.planner.workload import Workload

Components = dict[str, int]

PERSISTENT = (
    "packed_base", "embeddings", "head", "norms", "routers", "adapters", "gradients", "optimizer",
)  # fmt: skip
TRANSIENT = (
    "boundaries", "kept_activations", "layer_working_set", "logits_chunk", "dequantisation_buffer", "stream_buffers",
    "gathered",
)  # fmt: skip
COMPONENTS = PERSISTENT + TRANSIENT + UNTRACKED

IN_FLIGHT = 2  # layers whose offloaded activations, or whose packed weights, are on the device at a time
GATHERED = 3  # layers of a sharded base in memory at a time: one in use, one arriving, and its all-gather buffer
BUCKET_BYTES = 25 * 2**20  # of gradients that DDP reduces at a time


def phases_of(work: Workload) -> dict[str, Components]:
    """Bytes by component, all of COMPONENTS in their order, for each phase."""
    return {phase: _complete(work, components) for phase, components in _phases(work).items()}


def host_bytes(work: Workload) -> int:
    """Host memory of a GPU's rank: process, streamed layers, moments, and the largest of what is there in turn."""
    shapes, b = work.shapes, work.dtype_bytes
    embeddings = shapes.embedding * b if work.embedding_on_host else 0
    if work.device == "cuda":
        embeddings += shapes.layer_table * b
    reading = 2 * max(shapes.embedding, shapes.widest)
    streamed = _shard(work.streamed_bytes, work)
    in_turn = max(offloaded_bytes(work), reading, checkpoint_copies(work))
    return RUNTIME_BYTES + streamed + embeddings + host_moments(work) + in_turn


def model_bytes(work: Workload) -> int:
    """Device memory of a trained model in use, without activations: the base and its adapters."""
    return sum(_frozen(work).values()) + work.adapters.held_bytes + _stream_buffers(work)


def overhead_bytes(work: Workload, transient: int) -> int:
    """Device memory outside of tensors, when so many bytes of tensors are transient."""
    return sum(overhead(work, transient).values())


def _complete(work: Workload, components: Components) -> Components:
    """All components in their order, with those outside of tensors."""
    known = components | overhead(work, sum(components.get(name, 0) for name in TRANSIENT))
    return {name: known.get(name, 0) for name in COMPONENTS}


def _phases(work: Workload) -> dict[str, Components]:
    """The components of each phase that are not zero, without those outside of tensors."""
    frozen, full = _frozen(work), _full_modules(work)
    adapters = {"adapters": work.adapters.held_bytes + work.waiting.adapters}
    idle = frozen | adapters | {"optimizer": device_moments(work, updating=False)}
    training = idle | {"gradients": _gradient_bytes(work)}
    keeping = work.shapes.kinds_in(range(max(work.recomputed, work.offloaded), work.shapes.layers))
    kept = sum(count * kept_bytes(work, layer) for layer, count in keeping)
    saved = {"boundaries": _boundaries(work), "kept_activations": kept}
    weights = {
        "dequantisation_buffer": max(work.dequantized_bytes, full.inside),
        "stream_buffers": _stream_buffers(work),
    }
    forward = {"boundaries": 2 * boundary_bytes(work), "layer_working_set": forward_bytes(work) + head_bytes(work)}
    backward = _backward(work, saved)
    gathered, logits = _gathered(work), {"logits_chunk": logits_bytes(work)}
    loss = {"layer_working_set": head_bytes(work) + cast_bytes(work)}
    loss |= {"dequantisation_buffer": full.head, "gathered": gathered["ends"]}
    return {
        "load": frozen | {"dequantisation_buffer": widest_bytes(work), "gathered": gathered["load"]},
        "loss": training | saved | loss | logits,
        "backward": training | backward | weights | {"gathered": gathered["layers"]},
        "update": training | {"optimizer": device_moments(work, updating=True)},
        "evaluation": idle | forward | weights | {"gathered": max(gathered["ends"], gathered["layers"])} | logits,
        "save": idle | _saving(work),
    }


class _FullModules(NamedTuple):
    """Bytes that a fully trained module needs while it is used: its copy in the compute dtype, and its gradient."""

    inside: int  # the widest matrix of a layer, if layers train
    head: int


def _full_modules(work: Workload) -> _FullModules:
    """A copy in the compute dtype unless that is float32, the gradient in that dtype, and the gradient in float32."""
    per_value = 4 if work.dtype_bytes == 4 else 2 * work.dtype_bytes + 4
    inside = per_value * widest_bytes(work) // work.dtype_bytes if work.adapters.kind == "full" else 0
    return _FullModules(inside, per_value * work.shapes.embedding if work.adapters.head_trains else 0)


def _gathered(work: Workload) -> Components:
    """What a rank holds unsharded of a sharded base: while it loads, around embedding or head, in the layers.

    An all-gather arrives in one buffer and is then copied to its layout, so that for a moment it takes twice the bytes.
    """
    shapes, b = work.shapes, work.dtype_bytes
    layer = work.widest_layer_bytes + (shapes.norms + shapes.biases + shapes.kept_16bit) * b // shapes.layers
    ends = max(shapes.embedding, shapes.head) * b
    load = max(layer, ends) * (2 if work.sharded else 1) if work.processes > 1 or work.sharded else 0
    if not work.sharded:
        return {"load": load, "ends": 0, "layers": 0}
    return {"load": load, "ends": 0 if shapes.tied else 2 * ends, "layers": min(GATHERED, shapes.layers) * layer}


def _shard(size: int, work: Workload) -> int:
    """A rank's shard of so many frozen bytes."""
    return -(-size // work.shards)


def _backward(work: Workload, saved: Components) -> Components:
    """The largest moment of backward: it uses kept layers first, then offloaded ones, then recomputed ones.

    `saved`: what forward left.
    """
    in_flight = range(work.recomputed, work.offloaded)
    fetched = min(IN_FLIGHT, len(in_flight)) * _largest(work, in_flight, kept_bytes)
    kept = max(saved["kept_activations"], fetched)
    recomputed = _largest(work, range(work.recomputed), _recomputed_peak)
    keeping = range(work.recomputed, work.shapes.layers)
    working_set = _largest(work, keeping if kept else range(work.shapes.layers), backward_bytes)
    if recomputed <= kept + working_set:
        return saved | {"kept_activations": kept, "layer_working_set": working_set + cast_bytes(work)}
    return saved | {"kept_activations": 0, "layer_working_set": recomputed + cast_bytes(work)}


def _recomputed_peak(work: Workload, layer: Layer) -> int:
    """A layer that recomputes, in its backward."""
    return recompute_bytes(work, layer) + backward_bytes(work, layer)


def _largest(work: Workload, layers: range, size: Callable[[Workload, Layer], int]) -> int:
    """The largest of the sizes of some layers; 0 for none."""
    return max((size(work, layer) for layer, _ in work.shapes.kinds_in(layers)), default=0)


def _frozen(work: Workload) -> Components:
    """What is frozen; nothing where every weight trains."""
    shapes, b = work.shapes, work.dtype_bytes
    if work.adapters.kind == "full":
        return {}
    on_host = work.device == "cuda"  # a table that every layer reads is in host memory then
    embeddings = (shapes.embedding + (0 if on_host else shapes.layer_table)) * b
    # On a CPU, streamed layers are in the same memory.
    resident = work.all_layer_bytes - (work.streamed_bytes if work.device == "cuda" else 0)
    return {
        "packed_base": _shard(resident + work.outside_bytes, work),
        # A tied embedding is not sharded: it is used first and last.
        "embeddings": 0 if work.embedding_on_host else embeddings if shapes.tied else _shard(embeddings, work),
        "head": _shard(shapes.head * b, work),
        "norms": _shard((shapes.norms + shapes.biases) * b, work),
        "routers": _shard(shapes.kept_16bit * b, work),
    }


def _saving(work: Workload) -> Components:
    """On a CPU where every weight trains: the moments, and their copies on the way into a file."""
    if work.adapters.kind != "full" or work.device == "cuda":
        return {}
    return {"optimizer": moment_bytes(work.adapters.values, work.optimizer) + checkpoint_copies(work)}


def _gradient_bytes(work: Workload) -> int:
    """Float32 gradients; with several ranks they are in DDP's buckets, one of which is filled at a time."""
    return 4 * work.adapters.values + (min(BUCKET_BYTES, 4 * work.adapters.values) if work.processes > 1 else 0)


def _boundaries(work: Workload) -> int:
    """The inputs of recomputed layers; of offloaded ones two are on the device at a time, after the others."""
    offloaded = min(work.recomputed, work.offloaded)
    on_device = max(work.recomputed - offloaded, min(IN_FLIGHT, offloaded)) * boundary_bytes(work)
    return on_device + (offloaded_bytes(work) if work.device == "cpu" else 0)  # a CPU offloads into the same memory


def _stream_buffers(work: Workload) -> int:
    """Packed matrices of two layers, or this rank's shards of them: one in use, one being copied."""
    return _shard(min(IN_FLIGHT, work.streamed) * work.widest_layer_bytes, work)
