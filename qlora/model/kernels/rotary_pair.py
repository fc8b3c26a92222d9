"""Rotary position embedding of query and key: the reference in torch, and one kernel each way that saves cos and sin.

    y = x cos + r(x) sin,  r(x1, x2) = (-x2, x1),  dx = dy cos + r^T(dy sin)     x1, x2: the halves of a head

Every product and sum is rounded where torch rounds it. Another layout (interleaved pairs, a part of the head) is left
to the model's own code.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora.model.kernels.kernel_choice import is_better, probe_rows, random_inputs
from qlora.model.kernels.operators import register


def reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query [B, H, T, D], key [B, G, T, D], cos and sin [B or 1, T, D] -> both rotated."""
    query, key = (_rotated(x, cos[:, None], sin[:, None]) for x in (query, key))
    return query, key


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (grad * sin).chunk(2, dim=-1)
    return (grad * cos) + torch.cat((second, -first), dim=-1)


def is_chosen(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel is chosen for these tensors."""
    if not query.is_cuda or torch.compiler.is_compiling() or not takes(query, key, cos, sin):
        return False
    return bool(_is_chosen(query.device, query.dtype, (query.shape[1], key.shape[1], query.shape[-1])))


def takes(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the tensors have the layout and the one dtype of the kernel; their last dimension is contiguous."""
    tensors, width = (query, key, cos, sin), query.shape[-1]
    one_kind = all(tensor.dtype == query.dtype and tensor.shape[-1] == width for tensor in tensors)
    dense = all(tensor.stride(-1) == 1 for tensor in tensors) and query.numel() > 0
    fits = cos.dim() == 3 and cos.shape == sin.shape and cos.shape[:2] in ((1, query.shape[2]), query.shape[::2][:2])
    return one_kind and dense and fits and cos.stride() == sin.stride() and width % 2 == 0


def rotary_pair(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both rotated by one kernel, in the memory layout [B, T, H, D] of a projection's output."""
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return _kernel(query, key, cos, sin, inverse=False)
    rotated: tuple[Tensor, Tensor] = _RotaryPair.apply(query, key, cos, sin)
    return rotated


@cache
def _is_chosen(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> bool:
    heads, key_heads, width = sizes
    tokens = probe_rows(heads * width, dtype)
    shapes = ((1, tokens, heads, width), (1, tokens, key_heads, width), (1, tokens, width), (1, tokens, width))
    query, key, cos, sin = random_inputs(shapes, device, dtype)
    return is_better(
        "rotary embedding",
        lambda query, key: rotary_pair(query.transpose(1, 2), key.transpose(1, 2), cos, sin),
        lambda query, key: reference(query.transpose(1, 2), key.transpose(1, 2), cos, sin),
        [query, key],
    )


class _RotaryPair(torch.autograd.Function):
    """One kernel each way; saves cos and sin, which all layers share."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Query [B, H, T, D], key [B, G, T, D] -> both rotated."""
        ctx.save_for_backward(cos, sin)
        return _kernel(query, key, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients of query and key, by the transposed rotation."""
        cos, sin = ctx.saved_tensors
        query, key = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        return *_kernel(query, key, cos, sin, inverse=True), None, None


def _kernel(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    rotated: tuple[Tensor, Tensor] = torch.ops.qlora.rotary_pair.default(query, key, cos, sin, inverse)
    return rotated


def _empty(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    query, key = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, key))
    return query.transpose(1, 2), key.transpose(1, 2)


def on_cpu(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The operator in plain torch."""
    outs = _empty(query, key, cos, sin, inverse)
    rotate = _rotated_back if inverse else _rotated
    for out, x in zip(outs, (query, key), strict=True):
        out.copy_(rotate(x, cos[:, None], sin[:, None]))
    return outs


def _on_gpu(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    from qlora.model.kernels import rotary_kernel  # Triton is not installed everywhere

    outs = _empty(query, key, cos, sin, inverse)
    rotary_kernel.rotate((query, key), cos, sin, inverse, outs)
    return outs


register(
    "rotary_pair", "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    on_cpu, _on_gpu, _empty,
)  # fmt: skip
