"""The memory of FlashAttention's variable-length kernel, as an attention function without arithmetic.

For dry runs on `meta`: it allocates and saves what the kernel does (torch 2.13, FlashAttention 2): query, key, value,
output and float32 log-sum-exp are saved; backward has a float32 accumulator of the query's gradient, and gradients of
keys and values for every query head before they are summed over groups.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "dry_run_varlen"


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        log_sum = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, _value, _out, log_sum = ctx.saved_tensors
        workspace = torch.empty(query.shape, dtype=torch.float32, device=query.device), torch.empty_like(log_sum)
        gradient, *expanded = (torch.empty_like(query) for _ in range(3))
        del workspace
        if key.shape == query.shape:
            return gradient, expanded[0], expanded[1]
        key_gradient, value_gradient = (
            tensor.view(len(key), key.shape[1], -1, key.shape[2]).sum(2) for tensor in expanded
        )
        return gradient, key_gradient, value_gradient


def varlen_memory(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Query [B, H, T, D] -> [B, T, H, D]."""
    batch, heads, length, _head = query.shape
    flat = [tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], -1) for tensor in (query, key, value)]
    return _Varlen.apply(*flat).reshape(batch, length, heads, -1), None  # type: ignore[no-untyped-call]


AttentionInterface.register(NAME, varlen_memory)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
