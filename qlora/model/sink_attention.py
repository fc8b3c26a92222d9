"""Attention with sinks (gpt-oss): every head has a logit that takes part in the softmax and has no value.

    P = softmax([Q K^T * scale + mask, sink])    in float32        O = P V, without the column of the sink

A block of queries at a time, on any device: no T x T scores. Backward computes P again from Q and K. The sink's value
is zero: its column adds nothing to the gradients of scores, and its own gradient is -p_sink rowsum(P * dP).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.data.types import Branch
from qlora.model.cpu_attention import Block, blocks_of
from qlora.model.segment_masks import Visibility
from qlora.model.sequence_segments import SegmentsBySequence
from qlora.utils.send import send


class _SinkAttention(torch.autograd.Function):
    """[B, H, T, D] queries, [B, G, T, D] keys and values, [H] sinks -> [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, visible: "Visible") -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.visible = visible
        output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        for row, block in visible.blocks(query):
            probabilities = _probabilities(query[row], key[row], sinks, block, visible.scale)
            values = value[row][:, block.first_key : block.end]
            output[row, :, block.start : block.end] = _grouped_product(probabilities.to(value.dtype), values)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        query_grad = torch.empty_like(query)
        key_grad, value_grad, sink_grad = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value, sinks))
        for row, block in ctx.visible.blocks(query):
            queries, keys = slice(block.start, block.end), slice(block.first_key, block.end)
            grad, q, k, v = grads[0][row, :, queries], query[row, :, queries], key[row, :, keys], value[row, :, keys]
            p = _probabilities(query[row], key[row], sinks, block, ctx.visible.scale)
            dp = _grouped_product(grad, v.transpose(1, 2)).float()
            mean = (p * dp).sum(-1, keepdim=True)
            sink_grad -= ((1 - p.sum(-1, keepdim=True)) * mean).sum((1, 2))
            ds = (p * (dp - mean) * ctx.visible.scale).to(query.dtype)
            query_grad[row, :, queries] = _grouped_product(ds, k)
            key_grad[row, :, keys] += _summed_over_group(ds.transpose(1, 2), q, len(k))
            value_grad[row, :, keys] += _summed_over_group(p.to(grad.dtype).transpose(1, 2), grad, len(v))
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), sink_grad.to(sinks.dtype), None


class Visible:
    """What each query sees: the segments of every sequence, a window, and the scale of scores."""

    def __init__(self, segments: SegmentsBySequence, window: int | None, scale: float) -> None:
        self.segments, self.window, self.scale = segments, window, scale

    def blocks(self, query: Tensor) -> Iterator[tuple[int, Block]]:
        """Number of the sequence and block of queries, masks on the device of `query`."""
        for row, segments in enumerate(self.segments):
            for block in _blocks_on(segments, query.shape[2], self.window, query.device):
                yield row, block

    def mask(self, query: Tensor) -> Tensor:
        """[B, 1, T, T], true where a query sees a key."""
        length = query.shape[2]
        masks = [Visibility(segments, length, self.window).mask(0, length) for segments in self.segments]
        return send(torch.stack(masks)[:, None], query.device)


@lru_cache(maxsize=32)  # every layer of a micro-batch has the same documents
def _blocks_on(
    segments: tuple[Branch, ...], length: int, window: int | None, device: torch.device
) -> tuple[Block, ...]:
    return tuple(block._replace(mask=send(block.mask, device)) for block in blocks_of(segments, length, window))


def sink_attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, visible: Visible) -> Tensor:
    """Causal attention with sinks [H] inside documents: [B, H, T, D] -> [B, T, H, D]."""
    output: Tensor = _SinkAttention.apply(query, key, value, sinks, visible)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous()


def masked_sink_attention(
    inputs: tuple[Tensor, Tensor, Tensor], sinks: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """The same with a mask [B, 1, T, S], true where a query sees a key, for padding, KV caches and dropout."""
    query, key, value = inputs
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query.float() @ key.float().transpose(2, 3)) * scale
    if mask is not None:
        hidden = ~mask[..., : key.shape[2]] if mask.dtype == torch.bool else mask[..., : key.shape[2]] < 0
        scores = scores.masked_fill(hidden, -torch.inf)
    probabilities = F.dropout(_softmax_with_sink(scores, sinks[:, None]), dropout).to(value.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous()


def _softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """Probabilities [..., H, T, S] of float32 scores and of a sink [H, 1] that is left out of the result."""
    column = sinks.float()[..., None].expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def _probabilities(query: Tensor, key: Tensor, sinks: Tensor, block: Block, scale: float) -> Tensor:
    """Float32 [H, queries, keys] of one sequence's block."""
    q, k = query[:, block.start : block.end], key[:, block.first_key : block.end]
    scores = _grouped_product(q.float(), k.float().transpose(1, 2)) * scale
    scores[..., block.mask_start - block.first_key :] += block.mask
    return _softmax_with_sink(scores, sinks[:, None])


def _grouped_product(left: Tensor, right: Tensor) -> Tensor:
    """[H, M, N] x [G, N, P] -> [H, M, P]: heads in order share the matrix of their group."""
    heads, rows, _ = left.shape
    stacked = left.reshape(len(right), heads // len(right) * rows, -1)
    return (stacked @ right).view(heads, rows, -1)


def _summed_over_group(left: Tensor, right: Tensor, groups: int) -> Tensor:
    """[H, M, N] x [H, N, P], summed over the heads of a group -> float32 [G, M, P]."""
    product = (left @ right).float()
    return product.view(groups, -1, *product.shape[1:]).sum(1)
