"""16-bit causal attention on a CPU, a block of queries at a time: no T x T scores, and faster than SDPA's CPU kernel.

A block sees the keys from the start of its first document, or of its sliding window, up to the block's end:

    P = softmax(Q K^T * scale + mask)    in float32; mask is 0 or -inf        O = P V
    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP))    dQ = dS K * scale    dK = dS^T Q * scale

Backward computes P again from Q and K (FlashAttention, arXiv:2205.14135). Shapes: B sequences of T tokens, H query
heads, G key/value heads, D per head.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.data.types import Branch
from qlora.model.segment_masks import Visibility

BLOCK = 128  # queries
SCORES_BYTES = 4 * 2**20  # float32 scores computed at a time, over sequences and heads: they stay in a CPU's cache


class Block(NamedTuple):
    """Queries start..end see keys first_key..end; `mask` [end - start, end - mask_start] starts at key `mask_start`."""

    start: int
    end: int
    first_key: int
    mask_start: int
    mask: Tensor


@lru_cache(maxsize=32)  # every layer of a micro-batch has the same documents
def blocks_of(segments: tuple[Branch, ...], length: int, window: int | None) -> tuple[Block, ...]:
    """The blocks of a sequence of `length` tokens in `segments`: documents, and branches that continue a parent."""
    visibility = Visibility(segments, length, window)
    return tuple(_block(start, min(length, start + BLOCK), visibility) for start in range(0, length, BLOCK))


def _block(start: int, end: int, visibility: Visibility) -> Block:
    visible = visibility.mask(start, end)
    first_key = int(visible.any(0).int().argmax())
    # Keys that every query of the block sees need no mask: one run from `first_key` on, or none.
    by_all = visible[:, first_key:].all(0)
    mask_start = first_key + (int(by_all.int().argmin()) if by_all[0] and not by_all.all() else 0)
    mask = torch.zeros(end - start, end - mask_start).masked_fill_(~visible[:, mask_start:], -torch.inf)
    return Block(start, end, first_key, mask_start, mask)


@torch.library.custom_op("qlora::block_attention", mutates_args=(), device_types="cpu")
def block_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """Query [B, H, T, D], key and value [B, G, T, D], H a multiple of G -> [B, T, H, D].

    `segments` int [R, 2]: start and parent of each segment in the concatenated sequences, parent -1 for a document;
    None: every sequence is one document. Saves query, key and value for backward.
    """
    out = query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3])
    for batch, groups, heads, blocks in _slices(query, key, segments, window):
        inputs = query[batch, heads], key[batch, groups], value[batch, groups]
        _attend(*inputs, blocks, scale, out[batch, :, heads])
    return out


@torch.library.custom_op("qlora::block_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(
    grad: Tensor, inputs: Sequence[Tensor], segments: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs query, key and value, laid out as [B, T, heads, D], from `grad` of the output."""
    query_grad, key_grad, value_grad = (tensor.new_empty(tensor.transpose(1, 2).shape) for tensor in inputs)
    for batch, groups, heads, blocks in _slices(inputs[0], inputs[1], segments, window):
        sliced = [inputs[0][batch, heads], inputs[1][batch, groups], inputs[2][batch, groups]]
        grads = [query_grad[batch, :, heads], key_grad[batch, :, groups], value_grad[batch, :, groups]]
        _attend_backward(grad[batch, :, heads], sliced, blocks, scale, grads)
    return query_grad, key_grad, value_grad


@block_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


@block_attention_backward.register_fake
def _(_grad: Tensor, inputs: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.transpose(1, 2).shape) for tensor in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, segments, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, segments)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, segments = ctx.saved_tensors
    grads = block_attention_backward(grad, inputs, segments, ctx.window, ctx.scale)
    return *(tensor.transpose(1, 2) for tensor in grads), None, None, None


block_attention.register_autograd(_backward, setup_context=_setup_context)


def _slices(
    query: Tensor, key: Tensor, segments: Tensor | None, window: int | None
) -> Iterator[tuple[slice, slice, slice, tuple[Block, ...]]]:
    """Slices of sequences, key/value heads and query heads whose scores fit SCORES_BYTES, with their blocks."""
    (batch, heads, length, _), groups = query.shape, key.shape[1]
    heads_per_group = heads // groups
    max_groups = max(1, SCORES_BYTES // (4 * BLOCK * length * heads_per_group))
    for sequences, blocks in _sequences_with_blocks(batch, length, segments, window):
        step = max(1, max_groups // groups)
        for first in range(sequences.start, sequences.stop, step):
            for group in range(0, groups, max_groups):
                group_slice = slice(group, min(groups, group + max_groups))
                head_slice = slice(group_slice.start * heads_per_group, group_slice.stop * heads_per_group)
                yield slice(first, min(sequences.stop, first + step)), group_slice, head_slice, blocks


def _sequences_with_blocks(
    batch: int, length: int, segments: Tensor | None, window: int | None
) -> Iterator[tuple[slice, tuple[Block, ...]]]:
    """All sequences together where their segments are the same, else one by one; with their blocks."""
    by_row: list[list[Branch]] = [[] if segments is not None else [Branch(0, -1)] for _ in range(batch)]
    for start, parent in segments.tolist() if segments is not None else ():
        row = start // length
        by_row[row].append(Branch(start - row * length, parent - row * length if parent >= 0 else -1))
    rows = [tuple(row_segments) for row_segments in by_row]
    if len(set(rows)) == 1:
        yield slice(0, batch), blocks_of(rows[0], length, window)
        return
    yield from ((slice(row, row + 1), blocks_of(row_segments, length, window)) for row, row_segments in enumerate(rows))


def _attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float, out: Tensor) -> None:
    """Attention of sequences with the same blocks, written into `out` [B, T, H, D]."""
    (q, k, v), heads = _grouped(query, key, value), query.shape[1]
    q_scaled, k_float = q.float() * scale, k.float()
    for block in blocks:
        keys = slice(block.first_key, block.end)
        attended = torch.bmm(_probabilities(q_scaled, k_float, block).to(v.dtype), v[:, keys])
        out[:, block.start : block.end] = attended.view(len(query), heads, -1, v.shape[-1]).transpose(1, 2)


def _attend_backward(
    grad: Tensor, inputs: Sequence[Tensor], blocks: Sequence[Block], scale: float, grads: Sequence[Tensor]
) -> None:
    """Gradients of sequences with the same blocks, written into `grads`, each [B, T, heads, D]."""
    query, key, value = inputs
    (q, k, v), (batch, heads, _, width) = _grouped(query, key, value), query.shape
    out_grad = grad.transpose(1, 2).reshape(q.shape)
    q_scaled, k_float = q.float() * scale, k.float()
    k_grad, v_grad = torch.zeros_like(k_float), torch.zeros_like(v, dtype=torch.float32)
    for block in blocks:
        keys, queries = slice(block.first_key, block.end), slice(block.start, block.end)
        probabilities = _probabilities(q_scaled, k_float, block).to(v.dtype)
        block_grad, block_q = _stacked(out_grad, queries), _stacked(q, queries)
        v_grad[:, keys] += torch.bmm(probabilities.transpose(1, 2), block_grad)
        probability_grad = torch.bmm(block_grad, v[:, keys].transpose(1, 2))
        score_grad = torch._softmax_backward_data(probability_grad, probabilities, -1, v.dtype)
        q_grad = torch.bmm(score_grad, k[:, keys]) * scale
        grads[0][:, queries] = q_grad.view(batch, heads, -1, width).transpose(1, 2)
        k_grad[:, keys] += torch.bmm(score_grad.transpose(1, 2), block_q)
    grads[1].copy_((k_grad * scale).view(key.shape).transpose(1, 2))
    grads[2].copy_(v_grad.view(value.shape).transpose(1, 2))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B * G, H / G, T, D], key and value [B * G, T, D], contiguous."""
    batch, groups, length, width = key.shape
    stacked = query.reshape(batch * groups, query.shape[1] // groups, length, width)
    return stacked, key.reshape(-1, length, width), value.reshape(-1, length, width)


def _probabilities(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """Softmax of a block's scores, float32 [B * G, H / G * queries, keys]; `q` is scaled already."""
    queries = _stacked(q, slice(block.start, block.end))
    scores = torch.bmm(queries, k[:, block.first_key : block.end].transpose(1, 2))
    size = block.end - block.start
    scores.view(len(k), -1, size, scores.shape[-1])[..., block.mask_start - block.first_key :] += block.mask
    return torch.softmax(scores, dim=-1)


def _stacked(grouped: Tensor, queries: slice) -> Tensor:
    """Some queries of [B * G, H / G, T, D], the heads of a group concatenated: [B * G, H / G * queries, D]."""
    return grouped[:, :, queries].flatten(1, 2)
