"""Roofline estimate of a micro-batch: max(FLOPs / FLOP/s, bytes / link bandwidth), for forward and for backward.

It compares ways to run the same workload; it is never shown as a measurement. The last product of a recomputed layer is
not counted, since activation checkpointing stops before it.
"""

from dataclasses import dataclass

from qlora.memory.planner.activations import kept_bytes
from qlora.memory.planner.shapes import MLP_HIDDEN
from qlora.memory.planner.workload import Workload


@dataclass(frozen=True)
class DeviceSpeed:
    """What a GPU reaches in practice: bfloat16 matrix products, and copies to and from host memory, per direction."""

    flops_per_second: float
    link_bytes_per_second: float


# An RTX 4090 at 65 % of its 165 TFLOP/s, with half the bandwidth of PCIe 4 x16: a choice should hold on slower links.
REFERENCE_DEVICE = DeviceSpeed(107e12, 12.5e9)


def seconds(work: Workload, device: DeviceSpeed = REFERENCE_DEVICE) -> float:
    """Predicted seconds of one micro-batch; copies overlap with products as far as they can."""
    forward, backward, recomputed = flops(work)
    # A rank copies its own shard of a sharded base from host memory, and receives the others from their GPUs.
    layers = work.streamed * work.layer_bytes / work.shards
    layers += work.shapes.layers * work.layer_bytes * (work.shards - 1) / work.shards
    offloaded = offloaded_bytes(work)
    # The link is full duplex: forward offloads what backward fetches; weights are copied to the device in both.
    forward_seconds = max(
        forward / device.flops_per_second,
        layers / device.link_bytes_per_second,
        offloaded / device.link_bytes_per_second,
    )
    backward_seconds = max(
        (backward + recomputed) / device.flops_per_second, (layers + offloaded) / device.link_bytes_per_second
    )
    return forward_seconds + backward_seconds


def flops(work: Workload) -> tuple[float, float, float]:
    """FLOPs of forward, of backward, and of what backward recomputes, for one micro-batch."""
    shapes, rank = work.shapes, work.adapters.rank
    products = sum(2 * matrix.weights for matrix in shapes.block)  # of a token in one layer
    attention = 2 * work.max_length * shapes.query  # half of every T x T, twice
    adapters = 2 * work.adapters.values / shapes.layers if rank else 0.0
    last = sum(2 * matrix.weights for matrix in shapes.block if matrix.reads == MLP_HIDDEN)
    head = 4 * shapes.vocabulary * shapes.hidden  # logits and their gradient, in one pass
    forward = shapes.layers * (products + attention + adapters) + head
    backward = shapes.layers * (products + 2.5 * attention + 2 * adapters)
    recomputed = work.recomputed * (products - last + attention + adapters)
    return work.tokens * forward, work.tokens * backward, work.tokens * recomputed


def offloaded_bytes(work: Workload) -> int:
    """Bytes of activations in host memory: the inputs of layers that recompute, all saved tensors of the others."""
    inputs = min(work.recomputed, work.offloaded)
    return inputs * boundary_bytes(work) + (work.offloaded - inputs) * kept_bytes(work)


def boundary_bytes(work: Workload) -> int:
    """The hidden state between two layers."""
    return work.tokens * work.shapes.hidden * work.dtype_bytes
