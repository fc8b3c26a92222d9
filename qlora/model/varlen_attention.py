"""torch's variable-length attention kernel on a GPU: all documents of a micro-batch in one call, where it works.

Whether it works depends on GPU, dtype and head size (FlashAttention takes 16 bits, at most 256 per head, and compute
capability 8.0 on; some sizes lack a backward on some GPUs). So it is tried once for each, forward and backward, with
grouped heads and a sliding window, against attention in float32.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from qlora.model.path_keys import SegmentBounds, SegmentContexts
from qlora.utils.kernel_notes import note_kernel

HALF = (torch.bfloat16, torch.float16)
MAX_HEAD = 256
OPTIONS = ("scale", "window_size", "enable_gqa")  # of torch 2.12 on; torch 2.11 has no enable_gqa, torch 2.10 none
PROBE_KEY_LENGTHS = (9, 11)  # of branches, with the keys that they see before themselves
PROBE_LENGTHS, PROBE_HEADS, PROBE_GROUPS, PROBE_WINDOW = (5, 11), 4, 2, 3
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01}  # of values of size 1


def takes(query: Tensor, dropout: float, with_context: bool = False) -> bool:
    """Whether the kernel takes queries [..., D] of this device, dtype and head size; `with_context`: and more keys."""
    if not query.is_cuda or query.dtype not in HALF or dropout or query.shape[-1] > MAX_HEAD:
        return False
    return bool(works(query.device, query.dtype, query.shape[-1], with_context))


def varlen_attention(
    qkv: Sequence[Tensor], bounds: SegmentBounds, key_bounds: SegmentBounds, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention inside segments -> [N, H, D]: the last key of a segment is that of its last query.

    qkv: query [N, H, D], key and value [M, G, D]. M > N where segments have keys before their first query.
    """
    query, key, value = qkv
    return varlen_attn(  # type: ignore[return-value]
        query, key, value, bounds.cu_seqlens, key_bounds.cu_seqlens, bounds.longest, key_bounds.longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def attention_with_contexts(
    qkv: Sequence[Tensor], bounds: SegmentBounds, contexts: SegmentContexts, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention of segments [N, H, D] to the keys of their paths, which `contexts` gathers from key and value.

    The gathered keys of all layers would take several times the memory of key and value: backward gathers them again,
    and runs the kernel again, unless a compiler decides what is kept.
    """
    if torch.compiler.is_compiling():
        return _gathered(qkv, bounds, contexts, scale, window)
    output: Tensor = _AttentionWithContexts.apply(*qkv, bounds, contexts, scale, window)
    return output


def _gathered(
    qkv: Sequence[Tensor], bounds: SegmentBounds, contexts: SegmentContexts, scale: float | None, window: int | None
) -> Tensor:
    gathered = (tensor.index_select(0, contexts.indices) for tensor in qkv[1:])
    return varlen_attention((qkv[0], *gathered), bounds, contexts.bounds, scale, window)


class _AttentionWithContexts(torch.autograd.Function):
    """`_gathered`, which saves query, key and value alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
        """Query [N, H, D], key and value [N, G, D] -> [N, H, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.settings = settings
        return _gathered((query, key, value), *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value."""
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            output = _gathered(leaves, *ctx.settings)
        return *torch.autograd.grad(output, leaves, grads[0]), None, None, None, None


def has_options(kernel: Any) -> bool:
    """Whether a version of the kernel takes scale, window and grouped heads."""
    return set(OPTIONS) <= inspect.signature(kernel).parameters.keys()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiled layer keeps the answer
@cache
def works(device: torch.device, dtype: torch.dtype, head: int, with_context: bool = False) -> bool:
    """Whether the kernel runs here and agrees with attention in float32, in values and gradients.

    `with_context`: where segments have keys before their first query.
    """
    if not has_options(varlen_attn):
        return False
    try:
        # Hooks of its own: a probe inside a recomputed layer must not count among the tensors that the layer saves.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            agrees, reason = _agrees(device, dtype, head, with_context), "gives other numbers here"
    except Exception as error:  # a GPU, driver or build without it
        agrees, reason = False, f"does not run here ({type(error).__name__})"
    if not agrees:
        place = " for prefix trees" if with_context else ""
        note_kernel(f"attention: torch's variable-length kernel {reason}{place}: SDPA runs, document by document")
    return agrees


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _agrees(device: torch.device, dtype: torch.dtype, head: int, with_context: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    key_lengths = PROBE_KEY_LENGTHS if with_context else PROBE_LENGTHS
    (ends, bounds), (key_ends, key_bounds) = (_bounds(lengths, device) for lengths in (PROBE_LENGTHS, key_lengths))
    queries, keys = (ends[-1], PROBE_HEADS, head), (key_ends[-1], PROBE_GROUPS, head)
    shapes = (queries, keys, keys, queries)
    *inputs, direction = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    for window in (None, PROBE_WINDOW):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        exact = [tensor.float().requires_grad_() for tensor in inputs]
        out = varlen_attention(leaves[:3], bounds, key_bounds, None, window)
        expected = reference(exact, ends, key_ends, window)
        gradients = torch.autograd.grad(out, leaves, direction)
        references = torch.autograd.grad(expected, exact, direction.float())
        pairs = zip((out, *gradients), (expected, *references), strict=True)
        if not all(_is_close(value, other, TOLERANCE[dtype]) for value, other in pairs):
            return False
    return True


def _bounds(lengths: Sequence[int], device: torch.device) -> tuple[list[int], SegmentBounds]:
    ends = [0, *accumulate(lengths)]
    return ends, SegmentBounds(torch.tensor(ends, dtype=torch.int32, device=device), max(lengths))


def reference(qkv: Sequence[Tensor], ends: Sequence[int], key_ends: Sequence[int], window: int | None) -> Tensor:
    """The same by its definition, in the dtype of the inputs; `ends`, `key_ends`: 0 and the end of each segment."""
    query, repeats = qkv[0], qkv[0].shape[1] // qkv[1].shape[1]
    segments = []
    for (start, end), (first, last) in zip(pairwise(ends), pairwise(key_ends), strict=True):
        q = query[start:end].transpose(0, 1)
        k, v = (tensor[first:last].transpose(0, 1).repeat_interleave(repeats, 0) for tensor in qkv[1:])
        scores, earlier = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5, (last - first) - (end - start)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).tril(earlier)
        seen = seen if window is None else seen.triu(earlier + 1 - window)
        segments.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(segments)


def _is_close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    difference = (value.detach().float() - expected.detach()).abs().max()
    return bool(difference <= tolerance * max(1.0, float(expected.detach().abs().max())))
