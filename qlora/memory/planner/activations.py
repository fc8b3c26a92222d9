"""What one decoder layer saves for backward, and what it needs on top while it runs: formulas over shapes.

They count transformers' layers with this package's FrozenLinear, LoraLinear and attention; tests/memory compares them
with a FakeTensor dry run. All results are bytes of a whole micro-batch.
"""

from qlora.memory.planner.shapes import ATTENTION_OUTPUT
from qlora.memory.planner.workload import Workload
from qlora.utils.row_chunks import chunk_rows


def kept_bytes(work: Workload) -> int:
    """What one layer's forward saves for its backward, its own input included where backward reads it."""
    return work.tokens * (_norms(work) + _attention(work) + _mlp(work) + _dora(work)) + _scores(work)


def recompute_bytes(work: Workload) -> int:
    """What a recomputed layer holds, in addition to its boundary, when its backward begins."""
    return (
        kept_bytes(work) - work.tokens * work.shapes.hidden * work.dtype_bytes
    )  # the boundary: the first norm's input


def backward_bytes(work: Workload) -> int:
    """What a layer's backward needs in addition to saved tensors and one rebuilt W: the gradients alive at its peak."""
    shapes, b = work.shapes, work.dtype_bytes
    wide, hidden = work.tokens * shapes.intermediate * b, work.tokens * shapes.hidden * b
    others = 5 if shapes.parallel else 2  # gradients of hidden size
    chunk = min(work.tokens, chunk_rows(shapes.intermediate, work.device)) * shapes.intermediate * b
    moments = [
        wide + widest_bytes(work) + others * hidden,  # the product of the gradient with a rebuilt W
        2 * wide + (others - 1) * hidden + 4 * chunk,  # W is freed; the gated product's backward, row by row
    ]
    if work.recomputed:  # while the layer's forward is recomputed, the gradient of its last product waits
        moments += [2 * wide + others * hidden + 3 * chunk, 2 * wide + (others + 1) * hidden]
    linear = max(moments) - widest_bytes(work) + _dropout(work)  # W is counted as the dequantization buffer
    if not work.eager:
        return linear
    # The gradients of the scores, when what the MLP saved is freed.
    return max(linear, work.token_pairs * shapes.heads * (6 if b == 2 else 8) - work.tokens * _mlp(work))


def forward_bytes(work: Workload) -> int:
    """What a layer's forward needs when nothing is saved, as in evaluation."""
    shapes, b = work.shapes, work.dtype_bytes
    scores = work.token_pairs * shapes.heads * (4 + 3 * b) if work.eager else _scores(work)
    return work.tokens * (3 * shapes.intermediate + 3 * shapes.hidden) * b + scores


def head_bytes(work: Workload) -> int:
    """What the loss needs: input and output of the final norm, hidden states of trained tokens, their gradient."""
    return 4 * work.tokens * work.shapes.hidden * work.dtype_bytes


def logits_bytes(work: Workload) -> int:
    """One chunk of logits in float32, with the temporaries that make it; the previous chunk is freed by then."""
    rows = min(work.tokens, max(1, work.logits_bytes // (4 * work.shapes.vocabulary)))
    family = work.shapes.family
    # A soft cap holds the logits, their tanh, the capped ones, and two temporaries of its slope.
    per_logit = 20 if family.softcap else 8 if family.scaled else 4 + (2 if work.dtype_bytes == 2 else 0)
    return per_logit * rows * work.shapes.vocabulary


def widest_bytes(work: Workload) -> int:
    """The largest matrix of a layer in the compute dtype."""
    return max(matrix.weights for matrix in work.shapes.block) * work.dtype_bytes


def _norms(work: Workload) -> int:
    """Per token: the inputs of the norms, which backward rematerializes; heads' norms read views of saved tensors.

    Without norms before attention and MLP, these read the residual stream, which is saved.
    """
    shapes = work.shapes
    inputs = 1 if shapes.parallel else len(shapes.family.wide_norms) + (2 if shapes.family.norms_after else 0)
    heads = shapes.query + shapes.key_value if any(shapes.query_key_norms) else 0
    head_rows = 2 if shapes.family.flat_norms else shapes.heads + shapes.kv_heads
    rows = inputs + (head_rows if heads else 0)  # a GPU's kernel saves 1 / rms of each in float32
    return (inputs * shapes.hidden + heads) * work.dtype_bytes + (4 * rows if work.device == "cuda" else 0)


def cast_bytes(work: Workload) -> int:
    """Casts of A and B to the compute dtype, which a step on a GPU keeps."""
    kept = work.device == "cuda" and work.adapters.kind in ("lora", "rslora")
    return work.adapters.low_rank * work.dtype_bytes if kept else 0


def _attention(work: Workload) -> int:
    """Per token: what the kernel saves (query, key, value, output), and what the adapters read."""
    shapes, family = work.shapes, work.shapes.family
    repeated = work.repeats_keys
    kept = shapes.query + 2 * (shapes.query if repeated else shapes.key_value)
    if family.fused and (shapes.heads == shapes.kv_heads or not repeated):
        kept += (
            shapes.query + shapes.key_value
        )  # the value is a view of the fused output, which holds query and key too
    if not work.eager and not work.cpu_kernel:
        kept += shapes.query
    # The adapter reads the kernel's own output, unless that was concatenated or copied to another layout.
    if work.eager or work.by_document or work.cpu_kernel or family.fused:
        kept += shapes.query * work.adapter_reads(ATTENTION_OUTPUT)
    return kept * work.dtype_bytes + (0 if work.eager or work.cpu_kernel else 4 * shapes.heads)


def _mlp(work: Workload) -> int:
    """Per token: gate and up, or up alone; norm outputs and gated products are rematerialized."""
    shapes = work.shapes
    return shapes.intermediate * (2 if shapes.family.gated else 1) * work.dtype_bytes


def _dora(work: Workload) -> int:
    """Per token, of dora: layer outputs that nothing else saves (an MLP's inner ones are saved), and dropped inputs."""
    adapters, b = work.adapters, work.dtype_bytes
    if adapters.kind != "dora":
        return 0
    adapted = [matrix for matrix in work.shapes.block if matrix.path in adapters.paths_in_block]
    outputs = sum(
        matrix.out_features for matrix in adapted if matrix.bias or matrix.out_features < work.shapes.intermediate
    )
    return outputs * b + adapters.dropout * sum(matrix.in_features for matrix in adapted) * (b + 1)


def _scores(work: Workload) -> int:
    """T x T: the scores of every head where attention is eager, or the mask that the kernel saves."""
    b = work.dtype_bytes
    if not work.eager:
        return work.token_pairs * b if work.masked else 0
    capped = b if work.shapes.family.softcap else 0
    return work.token_pairs * work.shapes.heads * (4 + capped + (b if b != 4 else 0))


def _dropout(work: Workload) -> int:
    """The mask, which backward draws again from random numbers, and two dropped tensors."""
    if not work.adapters.dropout:
        return 0
    return work.tokens * max(matrix.in_features for matrix in work.shapes.block) * (5 + 2 * work.dtype_bytes)
