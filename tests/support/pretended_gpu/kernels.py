"""Stand-ins for kernels that a CPU build of torch or bitsandbytes lacks, or that are wrong there; by operator name.

FlashAttention by its definition in float32, forward and backward, with the demands of its CUDA kernel on inputs.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD, HALF = 256, (torch.bfloat16, torch.float16)


def _documents(qkv: tuple[Tensor, ...], bounds: tuple[Tensor, Tensor], window: list[int]) -> Iterator[Any]:
    """Of each document: its queries, its keys, query, key and value in float32 by head [H, T, D], and the mask.

    The last key is that of the last query.
    """
    repeats = qkv[0].shape[1] // qkv[1].shape[1]
    for (start, end), (first, last) in zip(*(pairwise(item.tolist()) for item in bounds), strict=True):
        tokens, keys, earlier = slice(start, end), slice(first, last), (last - first) - (end - start)
        q = qkv[0][tokens].transpose(0, 1).float()
        k, v = (tensor[keys].transpose(0, 1).float().repeat_interleave(repeats, 0) for tensor in qkv[1:])
        seen = torch.ones(end - start, last - first, dtype=torch.bool).tril(earlier)
        yield tokens, keys, q, k, v, seen if window[0] < 0 else seen.triu(earlier - window[0])


def _check(qkv: tuple[Tensor, ...], bounds: tuple[Tensor, Tensor], longest: tuple[int, int], window: list[int]) -> None:
    query, key, value = qkv
    assert query.dtype in HALF and key.dtype == value.dtype == query.dtype, "FlashAttention takes 16 bits"
    assert query.dim() == 3 and query.shape[-1] <= LARGEST_HEAD
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "the last dimension must be contiguous"
    for item, most, tensor in zip(bounds, longest, (query, key), strict=True):
        assert item.dtype == torch.int32 and item.is_contiguous()
        assert int(item.diff().max()) == most and int(item[-1]) == len(tensor), "wrong bounds of the documents"
    assert window[1] == 0, "causal attention only"


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, key_bounds: Tensor, longest: int, longest_key: int,
    is_causal: bool, scale: float | None, window: list[int], *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """torch_attn::_varlen_attn: output [N, H, D], log-sum-exp [H, N], an unused random state."""
    _check((query, key, value), (bounds, key_bounds), (longest, longest_key), window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = torch.empty_like(query)
    sums = torch.empty(query.shape[1], len(query))
    for tokens, _, q, k, v, seen in _documents((query, key, value), (bounds, key_bounds), window):
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        output[tokens] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
        sums[:, tokens] = scores.logsumexp(-1)
    return output, sums, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, bounds: Tensor,
    key_bounds: Tensor, longest: int, longest_key: int, is_causal: bool, state: Tensor, scale: float | None,
    window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """torch_attn::_varlen_attn_backward: gradients of query, key and value."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    groups = key.shape[1]
    for tokens, keys, q, k, v, seen in _documents((query, key, value), (bounds, key_bounds), window):
        d_out = gradient[tokens].transpose(0, 1).float()
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf")).softmax(-1)
        d_weights = d_out @ v.transpose(1, 2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        parts = d_scores @ k, d_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ d_out
        places = ((tokens, query.shape[1]), (keys, groups), (keys, groups))
        for whole, part, (place, heads) in zip(gradients, parts, places, strict=True):
            summed = part.unflatten(0, (heads, -1)).sum(1)  # over the heads that share a key
            whole[place] = summed.transpose(0, 1).to(query.dtype)
    return gradients  # type: ignore[return-value]


def dequantize_4bit(codes: Tensor, absmax: Tensor, block: int, kind: str, shape: list[int], dtype: Any) -> Tensor:
    """bitsandbytes::dequantize_4bit, as one long row: its CPU kernel is wrong where a block crosses a row's end."""
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    row = operator(codes.reshape(-1), absmax, block, kind, (1, 2 * codes.numel()), dtype)
    return row[0, : shape[0] * shape[1]].reshape(*shape).clone()  # type: ignore[no-any-return]


def dequantize_by_parts(*args: Any, **kwargs: Any) -> Tensor:
    """qlora::dequantize_4bit by its own function, so that its kernels are seen one by one."""
    from qlora.quant.bitsandbytes_ops import dequantize

    return dequantize(*args, **kwargs)


KERNELS: dict[str, Callable[..., Any]] = {
    "torch_attn::_varlen_attn": varlen_forward,
    "torch_attn::_varlen_attn_backward": varlen_backward,
    "bitsandbytes::dequantize_4bit": dequantize_4bit,
}
COMPOSED: dict[str, Callable[..., Any]] = {"qlora::dequantize_4bit": dequantize_by_parts}
