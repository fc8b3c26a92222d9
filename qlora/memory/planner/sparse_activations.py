"""What experts and recurrent mixers save for backward, and what they need on top while they run.

Experts: the rows of all tokens and their experts are sorted by expert (model/expert_forward.py). Recurrent mixers:
transformers' torch formulas, which compute in float32 (mixer_parts.py). Both are predicted, not exact.
"""

from qlora.memory.planner.shapes import EXPERT_HIDDEN, EXPERT_INPUT, Layer
from qlora.memory.planner.workload import Workload

INDEX_BYTES = 8  # of a row's expert, and of its place in the sorted order


def expert_kept_bytes(work: Workload, layer: Layer) -> int:
    """Sorted rows that the adapters read, gate and up of every visit, experts' outputs, and what the router saves."""
    experts, b = layer.experts, work.dtype_bytes
    if experts is None:
        return 0
    inner = experts.width * experts.kept
    row = work.shapes.hidden * (1 + work.adapter_reads(layer, EXPERT_INPUT))
    row += inner + experts.width * work.adapter_reads(layer, EXPERT_HIDDEN)
    router = 4 * experts.count + experts.per_token * (2 * INDEX_BYTES + 8)
    return work.tokens * (experts.per_token * row * b + router)


def expert_backward_bytes(work: Workload, layer: Layer) -> int:
    """The gradients of the rows: of the weighted sum, of the sorted outputs, of the sorted inputs."""
    if layer.experts is None:
        return 0
    rows = work.tokens * layer.experts.per_token
    return (3 * rows + 2 * work.tokens) * work.shapes.hidden * work.dtype_bytes


def expert_forward_bytes(work: Workload, layer: Layer) -> int:
    """The sorted rows, the experts' outputs twice, and one expert's inner values."""
    if layer.experts is None:
        return 0
    rows = work.tokens * layer.experts.per_token
    return (3 * rows + 2 * work.tokens) * work.shapes.hidden * work.dtype_bytes


def mixer_kept_bytes(work: Workload, layer: Layer) -> int:
    """What a recurrent mixer saves."""
    mixer = layer.recurrent
    return work.tokens * (mixer.kept * work.dtype_bytes + 4 * mixer.kept_float32) if mixer else 0


def mixer_backward_bytes(work: Workload, layer: Layer) -> int:
    """What a recurrent mixer's backward needs on top."""
    mixer = layer.recurrent
    return work.tokens * (4 * mixer.working + 2 * work.shapes.hidden * work.dtype_bytes) if mixer else 0
