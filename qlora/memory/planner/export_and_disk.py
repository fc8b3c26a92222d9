"""What training leaves room for: the device while a merge is written and certified, and the disk.

Neither decides how a run trains, so neither is part of its peak: a plan only says them.
"""

from dataclasses import replace

from qlora.memory.planner.activations import forward_bytes, head_bytes, logits_bytes
from qlora.memory.planner.breakdown import moment_bytes, outside_bytes, standing_bytes
from qlora.memory.planner.workload import Workload

MERGED_BYTES = 8  # of a weight while it is merged: 16 bit as read, float32 summed, 16 bit as written
SUMMED_BYTES = 3 * 4 * 2**22  # update, sum and error of the values that are summed at a time
CERTIFIED_TOKENS = 2048  # of rows compared at a time
LOGITS_SHARE, LOGITS = 4, 3  # a quarter of the loss's chunk, three times: both models' logits, their logarithms


def export_bytes(work: Workload) -> int:
    """The device's peak in `qlora export --to merged`: the trained model beside one matrix, or beside the written one.

    The written model shares the trained one's embedding and head; its matrices are read from the files one by one.
    """
    shapes, b = work.shapes, work.dtype_bytes
    widest = max(each.weights for each in shapes.block)
    rows = replace(work, micro_batch=max(1, CERTIFIED_TOKENS // work.max_length))
    written = (shapes.norms + 2 * widest) * b
    compared = written + forward_bytes(rows) + head_bytes(rows) + LOGITS * logits_bytes(rows) // LOGITS_SHARE
    passing = max(MERGED_BYTES * widest + SUMMED_BYTES, compared)
    return standing_bytes(work) + passing + outside_bytes(work, passing)


def disk_bytes(work: Workload, checkpoints: int) -> dict[str, int]:
    """What is fetched, kept for the next start, saved by a run with so many checkpoints, and exported."""
    shapes, adapters = work.shapes, work.adapters
    dense = shapes.parameters * work.dtype_bytes
    packed = shapes.layers * work.layer_bytes + (shapes.parameters - shapes.quantised) * work.dtype_bytes
    saved = 4 * adapters.values
    return {
        "base": dense,
        "kept_base": 0 if work.storage.kind == "dense" else packed,
        "run": saved + checkpoints * (saved + moment_bytes(adapters.values, work.optimizer)),
        "merged": dense,
    }
