"""What one decoder layer keeps for backward, and what it needs on top while it runs: formulas over shapes.

Counted for the layers as they are written in transformers with this project's FrozenLinear and LoraLinear in them, and
proved against a FakeTensor dry run in tests/memory. All figures are bytes of a whole micro-batch.
"""

from collections.abc import Collection

from qlora.memory.shapes import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_HIDDEN, MLP_INPUT, Matrix
from qlora.memory.work import Work


def kept_bytes(work: Work) -> int:
    """What one layer's forward keeps for its backward, its own input included where backward reads it."""
    adapted = _adapted(work)
    per_token = _norms(work) + _attention(work, adapted) + _mlp(work, adapted) + _branches(work, adapted)
    return work.tokens * per_token + _scores(work) + _rounded_adapters(work, adapted)


def recompute_bytes(work: Work) -> int:
    """What a recomputed layer holds beside its boundary when its backward begins."""
    shared = 4 * work.tokens * work.shapes.hidden if _keeps_its_input(work) else 0
    return kept_bytes(work) - shared


def backward_bytes(work: Work) -> int:
    """What a layer's backward needs on top of what was kept: the gradient that comes in, and the widest one inside."""
    shapes, b = work.shapes, work.dtype_bytes
    through_mlp = (shapes.intermediate + 3 * shapes.hidden) * b
    # Behind a sandwich norm's backward all is still kept, and its float32 gradients are several hidden states wide.
    through_norm = (19 * shapes.hidden if shapes.family.wide_norms > 2 else 0) + shapes.hidden * b
    linear = work.tokens * max(through_mlp, through_norm)
    if not shapes.family.softcap:
        return linear
    # The scores' gradients, when the MLP's share of what was kept is gone.
    scores = _squares(work) * shapes.heads * (6 if b == 2 else 8)
    return max(linear, scores - work.tokens * _mlp(work, _adapted(work)))


def forward_bytes(work: Work) -> int:
    """What a layer's forward needs when nothing is kept, as in evaluation."""
    shapes, b = work.shapes, work.dtype_bytes
    scores = _squares(work) * shapes.heads * (4 + 3 * b) if shapes.family.softcap else _mask(work)
    return work.tokens * (3 * shapes.intermediate + 3 * shapes.hidden) * b + scores


def head_bytes(work: Work) -> int:
    """What stays between the last layer and the loss: the final norm's input in float32, its output, the trained rows."""
    per_value = (0 if work.shapes.family.layer_norm else 4) + 2 * work.dtype_bytes
    return work.tokens * work.shapes.hidden * per_value


def logits_bytes(work: Work) -> int:
    """The loss's backward through one chunk: log-probabilities and two gradients of them, in float32."""
    rows = min(work.tokens, max(1, work.logits_bytes // (4 * work.shapes.vocabulary)))
    softcap = work.dtype_bytes if work.shapes.family.softcap else 0
    gradients = 2 * work.tokens * work.shapes.hidden * work.dtype_bytes
    return rows * work.shapes.vocabulary * (12 + softcap) + gradients


def _norms(work: Work) -> int:
    """Per token: the inputs of the norms, in float32 but for LayerNorm's."""
    shapes = work.shapes
    if shapes.family.layer_norm:
        inputs = 1 if shapes.parallel else 2
        return inputs * shapes.hidden * work.dtype_bytes + 4 * work.dtype_bytes
    wide = shapes.family.wide_norms * (4 * shapes.hidden + 4)
    heads = 4 * (shapes.query + shapes.key_value + shapes.heads + shapes.kv_heads)
    return wide + (heads if shapes.family.head_norms else 0)


def _attention(work: Work, adapted: Collection[Matrix]) -> int:
    """Per token: query, key, value and the output, as the attention kernel keeps them."""
    shapes, family, b = work.shapes, work.shapes.family, work.dtype_bytes
    # With a mask, keys and values are repeated for every query head.
    repeated = shapes.heads != shapes.kv_heads and (work.masked or family.softcap)
    key_value = shapes.query if repeated else shapes.key_value
    kept = shapes.query + 2 * key_value
    if family.fused and not repeated:
        kept += shapes.query + shapes.key_value  # the value is a view: query and key stay alive with it
    output = family.softcap or family.fused
    kept += shapes.query * (not family.softcap) + shapes.query * (output and _reads(adapted, ATTENTION_OUTPUT, work))
    kept += shapes.hidden * _reads(adapted, ATTENTION_INPUT, work)
    return kept * b + (0 if family.softcap else 4 * shapes.heads)


def _mlp(work: Work, adapted: Collection[Matrix]) -> int:
    """Per token: gate, activation and product, and what the adapters read."""
    shapes = work.shapes
    kept = shapes.intermediate * (3 if shapes.family.gated else 1)
    kept += shapes.hidden * _reads(adapted, MLP_INPUT, work) + shapes.intermediate * _reads(adapted, MLP_HIDDEN, work)
    return kept * work.dtype_bytes


def _branches(work: Work, adapted: Collection[Matrix]) -> int:
    """Per token: x A^T of every adapter; under dropout each adapter's own input and its mask."""
    b, mask = work.dtype_bytes, 1 if work.device == "cuda" else work.dtype_bytes
    dropped = sum(each.in_features for each in adapted) * (b + mask) if work.adapters.dropout else 0
    return len(adapted) * work.adapters.rank * b + dropped


def _rounded_adapters(work: Work, adapted: Collection[Matrix]) -> int:
    """A in the compute dtype where that is not float32, and s B: made in forward, read in backward."""
    columns = sum(each.in_features for each in adapted) if work.dtype_bytes != 4 else 0
    rows = sum(each.out_features for each in adapted)
    return work.adapters.rank * (columns + rows) * work.dtype_bytes


def _scores(work: Work) -> int:
    """T x T: the mask that the kernel keeps, or every head's scores where attention is computed eagerly."""
    if not work.shapes.family.softcap:
        return _mask(work)
    b = work.dtype_bytes
    return _squares(work) * work.shapes.heads * (4 + b + (b if b != 4 else 0))


def _mask(work: Work) -> int:
    return _squares(work) * work.dtype_bytes if work.masked else 0


def _squares(work: Work) -> int:
    return work.micro_batch * work.max_length**2


def _reads(adapted: Collection[Matrix], what: str, work: Work) -> bool:
    """Whether an adapter keeps that input as it is; under dropout it keeps its own."""
    return not work.adapters.dropout and any(each.reads == what for each in adapted)


def _keeps_its_input(work: Work) -> bool:
    """Whether what is kept holds the layer's input itself, not a float32 copy: then it is the boundary."""
    return work.dtype_bytes == 4 and not work.shapes.family.layer_norm


def _adapted(work: Work) -> list[Matrix]:
    """The matrices of a layer that carry an adapter in any layer."""
    return [each for each in work.shapes.block if each.path in work.adapters.paths_in_block]
