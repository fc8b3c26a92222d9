"""Memory of an export and disk space of a run. A plan reports them; they are not part of the peak of training."""

from dataclasses import replace

from qlora.memory.planner.activations import forward_bytes, head_bytes, logits_bytes
from qlora.memory.planner.breakdown import model_bytes, overhead_bytes
from qlora.memory.planner.optimizer_state import moment_bytes
from qlora.memory.planner.workload import Workload
from qlora.quant import Quant, build_quantizer

MERGED_BYTES = 8  # per weight while it is merged: 16 bit as read, float32 sum, 16 bit as written
MERGE_CHUNK_VALUES = 2**22  # of a matrix, merged and rounded at a time: 16 MiB each of update, sum and error
CERTIFICATE_TOKENS = 2048  # of the sequences that both models run at a time
LOGITS_FRACTION = 4  # the certificate computes a quarter of the loss's logits at a time
LOGITS_TENSORS = 3  # the logits of both models, and their logarithms


def export_bytes(work: Workload) -> int:
    """The device's peak in `qlora export --to merged`: the trained model, and the matrix or the model that is written.

    The written model shares embedding and head with the trained one; its matrices are read from the files one by one.
    """
    shapes, b = work.shapes, work.dtype_bytes
    widest = shapes.widest
    batch = replace(work, micro_batch=max(1, CERTIFICATE_TOKENS // work.max_length))
    logits = LOGITS_TENSORS * logits_bytes(batch) // LOGITS_FRACTION
    certify = (shapes.norms + shapes.kept_16bit + 2 * widest) * b + forward_bytes(batch) + head_bytes(batch) + logits
    merge = MERGED_BYTES * widest + 3 * 4 * MERGE_CHUNK_VALUES
    transient = max(merge, certify)
    return model_bytes(work) + transient + overhead_bytes(work, transient)


def disk_bytes(work: Workload, checkpoints: int) -> dict[str, int]:
    """Bytes of the downloaded base, of its quantized copy, of a run with so many checkpoints, of a merged model."""
    shapes, adapters = work.shapes, work.adapters
    dense = (shapes.parameters + shapes.stored_only) * work.dtype_bytes
    packed = work.all_layer_bytes + work.outside_bytes
    quantized = packed + (shapes.parameters - shapes.quantized) * work.dtype_bytes
    adapter_file = 4 * adapters.values
    checkpoint = adapter_file + moment_bytes(adapters.values, work.optimizer)
    return {
        "base": dense,
        "kept_base": 0 if work.quantizer == build_quantizer(Quant(kind="dense")) else quantized,
        "run": adapter_file + checkpoints * checkpoint,
        "merged": dense,
    }
