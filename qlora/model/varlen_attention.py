"""torch's variable-length attention kernel on a GPU: all documents of a micro-batch in one call, where it works.

Whether it works depends on GPU, dtype and head size (FlashAttention takes 16 bits, at most 256 per head, and compute
capability 8.0 on; some sizes lack a backward on some GPUs). So it is tried once for each, forward and backward, with
grouped heads and a sliding window, against attention in float32.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from qlora.utils.kernel_notes import note_kernel

HALF = (torch.bfloat16, torch.float16)
MAX_HEAD = 256
OPTIONS = ("scale", "window_size", "enable_gqa")  # of torch 2.12 on; torch 2.11 has no enable_gqa, torch 2.10 none
PROBE_LENGTHS, PROBE_HEADS, PROBE_GROUPS, PROBE_WINDOW = (5, 11), 4, 2, 3
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01}  # of values of size 1


def takes(query: Tensor, dropout: float) -> bool:
    """Whether the kernel takes queries [..., D] of this device, dtype and head size."""
    if not query.is_cuda or query.dtype not in HALF or dropout or query.shape[-1] > MAX_HEAD:
        return False
    return bool(works(query.device, query.dtype, query.shape[-1]))


def varlen_attention(
    qkv: Sequence[Tensor], bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention inside documents of at most `longest` tokens -> [N, H, D].

    qkv: query [N, H, D], key and value [N, G, D]. bounds: int32 [documents + 1].
    """
    query, key, value = qkv
    return varlen_attn(  # type: ignore[return-value]
        query, key, value, bounds, bounds, longest, longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def has_options(kernel: Any) -> bool:
    """Whether a version of the kernel takes scale, window and grouped heads."""
    return set(OPTIONS) <= inspect.signature(kernel).parameters.keys()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiled layer keeps the answer
@cache
def works(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Whether the kernel runs here and agrees with attention in float32, in values and gradients."""
    if not has_options(varlen_attn):
        return False
    try:
        with torch.enable_grad():
            agrees, reason = _agrees(device, dtype, head), "gives other numbers here"
    except Exception as error:  # a GPU, driver or build without it
        agrees, reason = False, f"does not run here ({type(error).__name__})"
    if not agrees:
        note_kernel(f"attention: torch's variable-length kernel {reason}: SDPA runs, document by document")
    return agrees


def _agrees(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    total = sum(PROBE_LENGTHS)
    shapes = [(total, heads, head) for heads in (PROBE_HEADS, PROBE_GROUPS, PROBE_GROUPS, PROBE_HEADS)]
    *inputs, direction = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    ends = torch.tensor([0, *PROBE_LENGTHS]).cumsum(0)
    bounds = ends.to(device, torch.int32)
    for window in (None, PROBE_WINDOW):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        exact = [tensor.float().requires_grad_() for tensor in inputs]
        out = varlen_attention(leaves[:3], bounds, max(PROBE_LENGTHS), None, window)
        expected = reference(exact[0], exact[1], exact[2], ends.tolist(), window)
        gradients = torch.autograd.grad(out, leaves, direction)
        references = torch.autograd.grad(expected, exact, direction.float())
        pairs = zip((out, *gradients), (expected, *references), strict=True)
        if not all(_is_close(value, other, TOLERANCE[dtype]) for value, other in pairs):
            return False
    return True


def reference(query: Tensor, key: Tensor, value: Tensor, ends: list[int], window: int | None) -> Tensor:
    """The same by its definition, in the dtype of the inputs; `ends`: 0 and the end of each document."""
    repeats = query.shape[1] // key.shape[1]
    documents = []
    for start, end in pairwise(ends):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        scores = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril()
        seen = seen if window is None else seen.triu(1 - window)
        documents.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(documents)


def _is_close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((value.float() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))
