"""Roofline estimate of a micro-batch: max(FLOPs / FLOP/s, bytes / link bandwidth), for forward and for backward.

It compares ways to run the same workload; it is never shown as a measurement. The last product of a recomputed layer is
not counted, since activation checkpointing stops before it.
"""

from dataclasses import dataclass

from qlora.memory.planner.activations import kept_bytes
from qlora.memory.planner.shapes import EXPERT_HIDDEN, MLP_HIDDEN, Layer
from qlora.memory.planner.workload import Workload


@dataclass(frozen=True)
class DeviceSpeed:
    """What a GPU reaches in practice: bfloat16 matrix products, and copies to and from host memory, per direction."""

    flops_per_second: float
    link_bytes_per_second: float


EXPERT_SECONDS = 150e-6  # of one expert in one pass: about 20 launches of small kernels, whatever its tokens

# An RTX 4090 at 65 % of its 165 TFLOP/s, with half the bandwidth of PCIe 4 x16: a choice should hold on slower links.
REFERENCE_DEVICE = DeviceSpeed(107e12, 12.5e9)


def seconds(work: Workload, device: DeviceSpeed = REFERENCE_DEVICE) -> float:
    """Predicted seconds of one micro-batch; copies overlap with products as far as they can."""
    forward, backward, recomputed = flops(work)
    # A rank copies its own shard of a sharded base from host memory, and receives the others from their GPUs.
    layers = work.streamed_bytes / work.shards
    layers += work.all_layer_bytes * (work.shards - 1) / work.shards
    offloaded = offloaded_bytes(work)
    # The link is full duplex: forward offloads what backward fetches; weights are copied to the device in both.
    launches = _expert_seconds(work)
    forward_seconds = max(
        forward / device.flops_per_second + launches[0],
        layers / device.link_bytes_per_second,
        offloaded / device.link_bytes_per_second,
    )
    backward_seconds = max(
        (backward + recomputed) / device.flops_per_second + launches[1],
        (layers + offloaded) / device.link_bytes_per_second,
    )
    return forward_seconds + backward_seconds


def _expert_seconds(work: Workload) -> tuple[float, float]:
    """Seconds of forward and of backward in which experts run one after the other; a backward takes two passes."""
    forward = sum(count * _visited(work, layer) for layer, count in work.shapes.all_kinds)
    recomputed = sum(count * _visited(work, layer) for layer, count in work.shapes.kinds_in(range(work.recomputed)))
    return EXPERT_SECONDS * forward, EXPERT_SECONDS * (2 * forward + recomputed)


def _visited(work: Workload, layer: Layer) -> int:
    """Experts of a layer that a micro-batch visits, at most."""
    return min(layer.experts.count, work.tokens * layer.experts.per_token) if layer.experts else 0


def flops(work: Workload) -> tuple[float, float, float]:
    """FLOPs of forward, of backward, and of what backward recomputes, for one micro-batch."""
    shapes = work.shapes
    adapters = 2 * active_adapter_values(work) / shapes.layers if work.adapters.rank else 0.0
    head = 4 * shapes.vocabulary * shapes.hidden  # logits and their gradient, in one pass
    forward, backward = float(head), 0.0
    for layer, count in shapes.all_kinds:
        products, attention = _products(layer), _attention(work, layer)
        forward += count * (products + attention + adapters)
        backward += count * (products + 2.5 * attention + 2 * adapters)
    recomputed = sum(
        count * (_products(layer) - _last(layer) + _attention(work, layer) + adapters)
        for layer, count in shapes.kinds_in(range(work.recomputed))
    )
    return work.tokens * forward, work.tokens * backward, work.tokens * recomputed


def active_adapter_values(work: Workload) -> int:
    """Values of the updates that a token reads: of experts, those that it visits."""
    experts = next((layer.experts for layer in work.shapes.kinds if layer.experts), None)
    if experts is None:
        return work.adapters.values
    return work.adapters.values - work.adapters.expert_values * (experts.count - experts.per_token) // experts.count


def _products(layer: Layer) -> float:
    """FLOPs of a token in the frozen matrices of a layer."""
    return float(sum(2 * matrix.weights * _visits(layer, matrix.experts) for matrix in layer.matrices))


def _visits(layer: Layer, experts: int) -> int:
    return layer.experts.per_token if layer.experts and experts else 1


def _last(layer: Layer) -> float:
    """FLOPs of the last product, which is not recomputed."""
    last = MLP_HIDDEN if layer.experts is None else EXPERT_HIDDEN
    return float(sum(2 * m.weights * _visits(layer, m.experts) for m in layer.matrices if m.reads == last))


def _attention(work: Workload, layer: Layer) -> float:
    """FLOPs of a token in attention: half of every T x T, twice; in a recurrent mixer, its float32 values."""
    mixer = 8.0 * layer.recurrent.kept_float32 if layer.recurrent else 0.0
    return mixer + (2 * work.max_length * layer.attention.query if layer.attention else 0)


def offloaded_bytes(work: Workload) -> int:
    """Bytes of activations in host memory: the inputs of layers that recompute, all saved tensors of the others."""
    inputs = min(work.recomputed, work.offloaded)
    others = work.shapes.kinds_in(range(inputs, work.offloaded))
    return inputs * boundary_bytes(work) + sum(count * kept_bytes(work, layer) for layer, count in others)


def boundary_bytes(work: Workload) -> int:
    """The hidden states between two layers."""
    streams = max(layer.streams for layer in work.shapes.kinds)
    return streams * work.tokens * work.shapes.hidden * work.dtype_bytes
