"""What one decoder layer saves for backward, and what it needs on top while it runs: formulas over shapes.

They count transformers' layers with this package's FrozenLinear, LoraLinear and attention; tests/memory compares them
with a FakeTensor dry run. All results are bytes of a whole micro-batch.
"""

from qlora.memory.planner.shapes import ATTENTION_OUTPUT, Attention, Layer
from qlora.memory.planner.sparse_activations import (
    expert_backward_bytes,
    expert_forward_bytes,
    expert_kept_bytes,
    mixer_backward_bytes,
    mixer_kept_bytes,
)
from qlora.memory.planner.workload import Workload
from qlora.utils.row_chunks import chunk_rows


def kept_bytes(work: Workload, layer: Layer) -> int:
    """What one layer's forward saves for its backward, its own input included where backward reads it."""
    per_token = _norms(work, layer) + _mlp(work, layer) + _dora(work, layer) + layer.kept * work.dtype_bytes
    if layer.attention:
        per_token += _attention(work, layer, layer.attention)
    scores = _scores(work, layer.attention) if layer.attention else 0
    return work.tokens * per_token + scores + expert_kept_bytes(work, layer) + mixer_kept_bytes(work, layer)


def recompute_bytes(work: Workload, layer: Layer) -> int:
    """What a recomputed layer holds, in addition to its boundary, when its backward begins."""
    return kept_bytes(work, layer) - work.tokens * work.shapes.hidden * work.dtype_bytes  # the first norm's input


def backward_bytes(work: Workload, layer: Layer) -> int:
    """What a layer's backward needs in addition to saved tensors and one rebuilt W: the gradients alive at its peak."""
    feed = max(_mlp_backward(work, layer) if layer.mlp else 0, expert_backward_bytes(work, layer))
    linear = feed + _dropout(work, layer)
    mixing = mixer_backward_bytes(work, layer)
    if layer.attention:
        mixing = max(mixing, _attention_backward(work, layer.attention))
    # The gradients inside attention or a mixer, when what MLP and experts saved is freed.
    return max(linear, mixing - work.tokens * _mlp(work, layer) - expert_kept_bytes(work, layer))


def _mlp_backward(work: Workload, layer: Layer) -> int:
    """The gradients alive in the backward of a dense MLP, without one rebuilt W."""
    b, widest = work.dtype_bytes, layer.widest * work.dtype_bytes
    wide, hidden = work.tokens * layer.mlp * b, work.tokens * work.shapes.hidden * b
    others = 5 if layer.parallel else 2  # gradients of hidden size
    chunk = min(work.tokens, chunk_rows(layer.mlp, work.device)) * layer.mlp * b
    moments = [
        wide + widest + others * hidden,  # the product of the gradient with a rebuilt W
        2 * wide + (others - 1) * hidden + 4 * chunk,  # W is freed; the gated product's backward, row by row
    ]
    if work.recomputed:  # while the layer's forward is recomputed, the gradient of its last product waits
        moments += [2 * wide + others * hidden + 3 * chunk, 2 * wide + (others + 1) * hidden]
    return max(moments) - widest  # W is counted as the dequantization buffer


def _attention_backward(work: Workload, attention: Attention) -> int:
    """The gradients alive in the backward of attention: of query, key, value and output, and of the hidden state."""
    if work.eager:
        return work.token_pairs * attention.heads * (6 if work.dtype_bytes == 2 else 8)  # of the scores
    features = 2 * attention.query + 2 * attention.key + 2 * attention.value + attention.gate
    return work.tokens * (features + work.shapes.hidden) * work.dtype_bytes


def forward_bytes(work: Workload) -> int:
    """What a layer's forward needs when nothing is saved, as in evaluation."""
    return max(_layer_forward(work, layer) for layer in work.shapes.kinds)


def _layer_forward(work: Workload, layer: Layer) -> int:
    b, scores = work.dtype_bytes, 0
    if layer.attention:
        pairs = work.token_pairs * layer.attention.heads
        scores = pairs * (4 + 3 * b) if work.eager else _scores(work, layer.attention)
    states = work.tokens * (3 * layer.mlp + 3 * work.shapes.hidden) * b
    return max(states + scores, expert_forward_bytes(work, layer), mixer_kept_bytes(work, layer))


def head_bytes(work: Workload) -> int:
    """What the loss needs: input and output of the final norm, hidden states of trained tokens, their gradient."""
    return 4 * work.tokens * work.shapes.hidden * work.dtype_bytes


def logits_bytes(work: Workload) -> int:
    """One chunk of logits in float32, with the temporaries that make it; the previous chunk is freed by then."""
    rows = min(work.tokens, max(1, work.logits_bytes // (4 * work.shapes.vocabulary)))
    flags = work.shapes.flags
    # A soft cap holds the logits, their tanh, the capped ones, and two temporaries of its slope.
    per_logit = (
        20 if flags.softcap or flags.final_softcap else 8 if flags.scaled else 4 + (2 if work.dtype_bytes == 2 else 0)
    )
    return per_logit * rows * work.shapes.vocabulary


def widest_bytes(work: Workload) -> int:
    """The largest matrix in the compute dtype; of experts, one at a time is rebuilt."""
    return work.shapes.widest * work.dtype_bytes


def cast_bytes(work: Workload) -> int:
    """Casts of A and B to the compute dtype, which a step on a GPU keeps."""
    kept = work.device == "cuda" and work.adapters.kind in ("lora", "rslora")
    return work.adapters.low_rank * work.dtype_bytes if kept else 0


def _norms(work: Workload, layer: Layer) -> int:
    """Per token: the inputs of the norms, which backward rematerializes; heads' norms read views of saved tensors.

    Without norms before attention and MLP, these read the residual stream, which is saved.
    """
    flags, attention = work.shapes.flags, layer.attention
    inputs = 1 if layer.parallel else layer.streams * len(layer.wide_norms) + (2 if layer.norms_after else 0)
    heads = attention.query + attention.key if attention and any(attention.norms) else 0
    head_rows = 2 if flags.flat_norms else attention.heads + attention.kv_heads if attention else 0
    rows = inputs + (head_rows if heads else 0)  # a GPU's kernel saves 1 / rms of each in float32
    return (inputs * work.shapes.hidden + heads) * work.dtype_bytes + (4 * rows if work.device == "cuda" else 0)


def _attention(work: Workload, layer: Layer, attention: Attention) -> int:
    """Per token: what the kernel saves (query, key, value, output), and what the adapters read."""
    flags, repeated = work.shapes.flags, work.repeats_keys(layer)
    keys = attention.query + attention.output if repeated else attention.key + attention.value
    kept = attention.query + (0 if attention.shared else keys)
    if flags.fused and (attention.heads == attention.kv_heads or not repeated):
        kept += attention.query + attention.key  # the value is a view of the fused output, which holds these too
    if not work.eager and not work.cpu_kernel:
        kept += attention.output
    kept += attention.latent + 2 * attention.gate
    # The adapter reads the kernel's own output, unless that was concatenated or copied to another layout.
    reads = work.adapter_reads(layer, ATTENTION_OUTPUT)
    joined = flags.joined_rotary and not work.is_unfused(attention)
    if work.eager or work.by_document or work.cpu_kernel or flags.fused or joined:
        kept += attention.output * (reads or attention.gate > 0)
    kept += attention.output * (reads and attention.gate > 0)  # the product with the gate
    return kept * work.dtype_bytes + (0 if work.eager or work.cpu_kernel else 4 * attention.heads)


def _mlp(work: Workload, layer: Layer) -> int:
    """Per token: gate and up, or up alone; norm outputs and gated products are rematerialized."""
    return layer.mlp * layer.mlp_kept * work.dtype_bytes


def _dora(work: Workload, layer: Layer) -> int:
    """Per token, of dora: layer outputs that nothing else saves (an MLP's inner ones are saved), and dropped inputs."""
    adapters, b = work.adapters, work.dtype_bytes
    if adapters.kind != "dora":
        return 0
    plain = (matrix for matrix in layer.matrices if not matrix.experts)
    adapted = [matrix for matrix in plain if matrix.path in adapters.paths_in_block]
    outputs = sum(matrix.out_features for matrix in adapted if matrix.bias or matrix.out_features < layer.mlp)
    return outputs * b + adapters.dropout * sum(matrix.in_features for matrix in adapted) * (b + 1)


def _scores(work: Workload, attention: Attention) -> int:
    """T x T: the scores of every head where attention is eager, or the mask that the kernel saves."""
    b = work.dtype_bytes
    if not work.eager:
        mask = work.token_pairs * b if work.is_masked(attention.window) else 0
        return mask + work.is_unfused(attention) * work.token_pairs * attention.heads * b  # every head's probabilities
    capped = b if work.shapes.flags.softcap else 0
    return work.token_pairs * attention.heads * (4 + capped + (b if b != 4 else 0))


def _dropout(work: Workload, layer: Layer) -> int:
    """The mask, which backward draws again from random numbers, and two dropped tensors."""
    if not work.adapters.dropout:
        return 0
    widest = max((matrix.in_features for matrix in layer.matrices if not matrix.experts), default=0)
    return work.tokens * widest * (5 + 2 * work.dtype_bytes)
