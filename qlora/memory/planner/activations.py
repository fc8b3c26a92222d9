"""What one decoder layer keeps for backward, and what it needs on top while it runs: formulas over shapes.

Counted for the layers as they are written in transformers with this project's FrozenLinear, LoraLinear and attention in
them, and proved against a FakeTensor dry run in tests/memory. All figures are bytes of a whole micro-batch.
"""

from qlora.memory.planner.shapes import ATTENTION_OUTPUT
from qlora.memory.planner.workload import Workload


def kept_bytes(work: Workload) -> int:
    """What one layer's forward keeps for its backward, its own input included where backward reads it."""
    return work.tokens * (_norms(work) + _attention(work) + _mlp(work) + _magnified(work)) + _scores(work)


def recompute_bytes(work: Workload) -> int:
    """What a recomputed layer holds beside its boundary when its backward begins."""
    return kept_bytes(work) - work.tokens * work.shapes.hidden * work.dtype_bytes  # the first norm's input is it


def backward_bytes(work: Workload) -> int:
    """What a layer's backward needs on top of what was kept and one rebuilt matrix: the gradients alive at its peak."""
    shapes, b = work.shapes, work.dtype_bytes
    wide = work.tokens * shapes.intermediate * b
    # The product with W gives one gradient as wide as the MLP; then W goes and the branch's sum makes it two.
    through_mlp = wide + max(0, wide - widest_bytes(work))
    linear = through_mlp + work.tokens * (5 if shapes.parallel else 2) * shapes.hidden * b + _dropout(work)
    if not work.eager:
        return linear
    # The scores' gradients, when the MLP's share of what was kept is gone.
    return max(linear, work.squares * shapes.heads * (6 if b == 2 else 8) - work.tokens * _mlp(work))


def forward_bytes(work: Workload) -> int:
    """What a layer's forward needs when nothing is kept, as in evaluation."""
    shapes, b = work.shapes, work.dtype_bytes
    scores = work.squares * shapes.heads * (4 + 3 * b) if work.eager else _scores(work)
    return work.tokens * (3 * shapes.intermediate + 3 * shapes.hidden) * b + scores


def head_bytes(work: Workload) -> int:
    """What stays while the loss is computed: the final norm's input and output, the trained rows and their gradient."""
    return 4 * work.tokens * work.shapes.hidden * work.dtype_bytes


def logits_bytes(work: Workload) -> int:
    """One chunk of the loss in float32, its making included; the chunk before is gone by then."""
    rows = min(work.tokens, max(1, work.logits_bytes // (4 * work.shapes.vocabulary)))
    family = work.shapes.family
    # A soft cap holds the logits, their tanh, the bent ones, and two steps on the way to its slope.
    making = 20 if family.softcap else 8 if family.scaled else 4 + (2 if work.dtype_bytes == 2 else 0)
    return making * rows * work.shapes.vocabulary


def widest_bytes(work: Workload) -> int:
    """The widest matrix of a layer in the compute dtype."""
    return max(each.weights for each in work.shapes.block) * work.dtype_bytes


def _norms(work: Workload) -> int:
    """Per token: the inputs of the norms, from which they are made again; heads' norms read views of what is kept."""
    shapes = work.shapes
    inputs = 1 if shapes.parallel else shapes.family.wide_norms
    heads = shapes.query + shapes.key_value if shapes.family.head_norms else 0
    return (inputs * shapes.hidden + heads) * work.dtype_bytes


def _attention(work: Workload) -> int:
    """Per token: what the kernel reads and gives (query, key, value, output), and what the adapters read."""
    shapes, family = work.shapes, work.shapes.family
    repeated = work.eager or work.masked  # keys and values once for every query head
    kept = shapes.query + 2 * (shapes.query if repeated else shapes.key_value)
    if family.fused and (shapes.heads == shapes.kv_heads or not repeated):
        kept += shapes.query + shapes.key_value  # the value is a view: query and key stay alive with it
    if not work.eager and not work.in_blocks:
        kept += shapes.query
    # The adapter reads the kernel's own output, unless that was put together from parts or laid out anew.
    if work.eager or work.cut or work.in_blocks or family.fused:
        kept += shapes.query * work.reads(ATTENTION_OUTPUT)
    return kept * work.dtype_bytes + (0 if work.eager or work.in_blocks else 4 * shapes.heads)


def _mlp(work: Workload) -> int:
    """Per token: gate and up, or up alone; norm outputs and products are made again from what is kept."""
    shapes = work.shapes
    return shapes.intermediate * (2 if shapes.family.gated else 1) * work.dtype_bytes


def _magnified(work: Workload) -> int:
    """Per token, of dora: outputs that nobody else keeps (an MLP's inner ones are kept anyway), and dropped inputs."""
    adapters, b = work.adapters, work.dtype_bytes
    if adapters.kind != "dora":
        return 0
    chosen = [each for each in work.shapes.block if each.path in adapters.paths_in_block]
    outputs = sum(each.out_features for each in chosen if each.bias or each.out_features < work.shapes.intermediate)
    return outputs * b + adapters.dropout * sum(each.in_features for each in chosen) * (b + 1)


def _scores(work: Workload) -> int:
    """T x T: every head's scores where attention is computed eagerly, or the mask that the kernel keeps."""
    b = work.dtype_bytes
    if not work.eager:
        return work.squares * b if work.masked else 0
    capped = b if work.shapes.family.softcap else 0
    return work.squares * work.shapes.heads * (4 + capped + (b if b != 4 else 0))


def _dropout(work: Workload) -> int:
    """The mask made again in backward, random numbers first, and two dropped tensors."""
    if not work.adapters.dropout:
        return 0
    return work.tokens * max(each.in_features for each in work.shapes.block) * (5 + 2 * work.dtype_bytes)
