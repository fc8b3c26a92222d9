"""How long a micro-batch would take: products over a card's speed, copies over its link, the longer of the two.

A prediction for comparing ways to run the same thing, never shown as a measurement. FLOPs: reference 2.1, with the last
product of a recomputed layer left out, as recompute.py does.
"""

from dataclasses import dataclass

from qlora.memory.planner.activations import kept_bytes
from qlora.memory.planner.shapes import MLP_HIDDEN
from qlora.memory.planner.workload import Workload


@dataclass(frozen=True)
class DeviceSpeed:
    """What a card reaches in practice: bfloat16 products, and copies each way between it and main memory."""

    flops_per_second: float
    link_bytes_per_second: float


# A 4090 at 65 % of its 165 TFLOP/s, on half of what PCIe 4 x16 gives: what a choice rests on holds on slower links too.
PACE = DeviceSpeed(107e12, 12.5e9)


def seconds(work: Workload, pace: DeviceSpeed = PACE) -> float:
    """Predicted seconds of one micro-batch, copies hidden behind products as far as they can be."""
    forward, backward, again = flops(work)
    # Of a sharded base a process fetches its own part from main memory, the others' from their cards.
    layers = work.streamed * work.layer_bytes / work.share
    layers += work.shapes.layers * work.layer_bytes * (work.share - 1) / work.share
    away = parked_bytes(work)
    # The link takes both directions at once: forward parks what backward fetches, weights come in both.
    out = max(forward / pace.flops_per_second, layers / pace.link_bytes_per_second, away / pace.link_bytes_per_second)
    back = max((backward + again) / pace.flops_per_second, (layers + away) / pace.link_bytes_per_second)
    return out + back


def flops(work: Workload) -> tuple[float, float, float]:
    """FLOPs of forward, of backward, and of what backward computes again, for one micro-batch."""
    shapes, rank = work.shapes, work.adapters.rank
    products = sum(2 * each.weights for each in shapes.block)  # of a token in one layer
    attention = 2 * work.max_length * shapes.query  # half of every T x T, twice
    branch = 2 * work.adapters.values / shapes.layers if rank else 0.0
    last = sum(2 * each.weights for each in shapes.block if each.reads == MLP_HIDDEN)
    head = 4 * shapes.vocabulary * shapes.hidden  # logits and their way back, in one pass
    forward = shapes.layers * (products + attention + branch) + head
    backward = shapes.layers * (products + 2.5 * attention + 2 * branch)
    again = work.recomputed * (products - last + attention + branch)
    return work.tokens * forward, work.tokens * backward, work.tokens * again


def parked_bytes(work: Workload) -> int:
    """What waits in host memory: the inputs of recomputed layers, all that others keep."""
    inputs = min(work.recomputed, work.parked)
    return inputs * boundary_bytes(work) + (work.parked - inputs) * kept_bytes(work)


def boundary_bytes(work: Workload) -> int:
    """The hidden state between two layers."""
    return work.tokens * work.shapes.hidden * work.dtype_bytes
