"""Causal attention on a CPU in 16 bits, a block of queries at a time: no T x T scores, and faster than SDPA's kernel.

Scores and softmax are float32, as there. A block sees keys from where its first document begins, or its sliding window,
up to its own end.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # queries at a time
SCORES_BYTES = 4 * 2**20  # of float32 scores at a time, for as many rows or heads as that is: a CPU's cache holds them


class Block(NamedTuple):
    """Queries begin..end see keys first..end; `mask` [end-begin, end-masked] goes on the scores from `masked` on."""

    begin: int
    end: int
    first: int
    masked: int
    mask: Tensor


@lru_cache(maxsize=32)  # all layers of a micro-batch ask for the same rows
def blocks_of(starts: tuple[int, ...], length: int, window: int | None) -> tuple[Block, ...]:
    """The blocks of a row of `length` tokens whose documents begin at `starts`."""
    return tuple(_block(begin, min(length, begin + BLOCK), starts, window) for begin in range(0, length, BLOCK))


def _block(begin: int, end: int, starts: tuple[int, ...], window: int | None) -> Block:
    queries, keys = torch.arange(begin, end)[:, None], torch.arange(end)[None]
    documents = torch.tensor(starts)
    of_query, of_key = (torch.searchsorted(documents, each, right=True) for each in (queries, keys))
    seen = (of_query == of_key) & (keys <= queries)
    if window is not None:
        seen &= keys > queries - window
    first = int(seen.any(0).int().argmax())
    # Columns in which every query of the block sees the key need no mask; they are one run after `first`, or none.
    everywhere = seen[:, first:].all(0)
    masked = first + (int(everywhere.int().argmin()) if everywhere[0] and not everywhere.all() else 0)
    mask = torch.zeros(end - begin, end - masked).masked_fill_(~seen[:, masked:], -torch.inf)
    return Block(begin, end, first, masked, mask)


@torch.library.custom_op("qlora::block_attention", mutates_args=(), device_types="cpu")
def block_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """Query [B, H, T, D], key and value [B, G, T, D], H a multiple of G -> [B, T, H, D].

    `ends` [documents + 1]: where documents begin, over all rows one after the other; None: every row is one. Keeps
    query, key and value; scores are made again in backward (arXiv:2205.14135).
    """
    out = query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3])
    for rows, groups, heads, blocks in _parts(query, key, ends, window):
        of_part = query[rows, heads], key[rows, groups], value[rows, groups]
        _attend(*of_part, blocks, scale, out[rows, :, heads])
    return out


@torch.library.custom_op("qlora::block_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(
    grad: Tensor, inputs: Sequence[Tensor], ends: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs query, key and value, laid out as [B, T, heads, D], from that of the output."""
    query, key, value = (each.new_empty(each.transpose(1, 2).shape) for each in inputs)
    for rows, groups, heads, blocks in _parts(inputs[0], inputs[1], ends, window):
        of_part = [inputs[0][rows, heads], inputs[1][rows, groups], inputs[2][rows, groups]]
        found = [query[rows, :, heads], key[rows, :, groups], value[rows, :, groups]]
        _attend_backward(grad[rows, :, heads], of_part, blocks, scale, found)
    return query, key, value


@block_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


@block_attention_backward.register_fake
def _(_grad: Tensor, inputs: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.transpose(1, 2).shape) for each in inputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ends, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, ends)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, ends = ctx.saved_tensors
    found = block_attention_backward(grad, inputs, ends, ctx.window, ctx.scale)
    return *(each.transpose(1, 2) for each in found), None, None, None


block_attention.register_autograd(_back, setup_context=_keep)


def _parts(
    query: Tensor, key: Tensor, ends: Tensor | None, window: int | None
) -> Iterator[tuple[slice, slice, slice, tuple[Block, ...]]]:
    """Rows cut alike with their blocks, as many rows, or groups and heads of one row, as SCORES_BYTES allow."""
    (rows, heads, length, _), groups = query.shape, key.shape[1]
    of_group = heads // groups
    at_once = max(1, SCORES_BYTES // (4 * BLOCK * length * of_group))  # groups
    for alike, blocks in _rows_with_blocks(rows, length, ends, window):
        several = max(1, at_once // groups)  # rows
        for row in range(alike.start, alike.stop, several):
            for group in range(0, groups, at_once):
                these = slice(group, min(groups, group + at_once))
                those = slice(these.start * of_group, these.stop * of_group)
                yield slice(row, min(alike.stop, row + several)), these, those, blocks


def _rows_with_blocks(
    rows: int, length: int, ends: Tensor | None, window: int | None
) -> Iterator[tuple[slice, tuple[Block, ...]]]:
    """Rows cut alike at once, others one by one, with their blocks."""
    cuts: list[tuple[int, ...]] = [(0,)] * rows
    if ends is not None:
        begins = [divmod(int(end), length) for end in ends[:-1]]
        cuts = [tuple(start for of_row, start in begins if of_row == row) for row in range(rows)]
    if len(set(cuts)) == 1:
        yield slice(0, rows), blocks_of(cuts[0], length, window)
        return
    yield from ((slice(row, row + 1), blocks_of(cut, length, window)) for row, cut in enumerate(cuts))


def _attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float, out: Tensor) -> None:
    """Attention of rows with the same blocks, written into `out` [B, T, H, D]."""
    (q, k, v), heads = _grouped(query, key, value), query.shape[1]
    scaled, exact = q.float() * scale, k.float()
    for block in blocks:
        found = torch.bmm(_probabilities(scaled, exact, block).to(v.dtype), v[:, block.first : block.end])
        out[:, block.begin : block.end] = found.view(len(query), heads, -1, v.shape[-1]).transpose(1, 2)


def _attend_backward(
    grad: Tensor, inputs: Sequence[Tensor], blocks: Sequence[Block], scale: float, found: Sequence[Tensor]
) -> None:
    """Gradients of rows with the same blocks, written into `found`, each [B, T, heads, D]."""
    query, key, value = inputs
    (q, k, v), (rows, heads, _, width) = _grouped(query, key, value), query.shape
    g = grad.transpose(1, 2).reshape(q.shape)
    scaled, exact = q.float() * scale, k.float()
    of_k, of_v = torch.zeros_like(exact), torch.zeros_like(v, dtype=torch.float32)
    for block in blocks:
        seen, queries = slice(block.first, block.end), slice(block.begin, block.end)
        probabilities = _probabilities(scaled, exact, block).to(v.dtype)
        mine, asked = _stacked(g, queries), _stacked(q, queries)
        of_v[:, seen] += torch.bmm(probabilities.transpose(1, 2), mine)
        of_probabilities = torch.bmm(mine, v[:, seen].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, v.dtype)
        of_q = torch.bmm(of_scores, k[:, seen]) * scale
        found[0][:, queries] = of_q.view(rows, heads, -1, width).transpose(1, 2)
        of_k[:, seen] += torch.bmm(of_scores.transpose(1, 2), asked)
    found[1].copy_((of_k * scale).view(key.shape).transpose(1, 2))
    found[2].copy_(of_v.view(value.shape).transpose(1, 2))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B * G, heads a group, T, D], key and value [B * G, T, D], contiguous."""
    rows, groups, length, width = key.shape
    stacked = query.reshape(rows * groups, query.shape[1] // groups, length, width)
    return stacked, key.reshape(-1, length, width), value.reshape(-1, length, width)


def _probabilities(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """Softmax of a block's scores, float32 [groups, heads a group * queries, keys]; `q` is scaled already."""
    queries = _stacked(q, slice(block.begin, block.end))
    scores = torch.bmm(queries, k[:, block.first : block.end].transpose(1, 2))
    size = block.end - block.begin
    scores.view(len(k), -1, size, scores.shape[-1])[..., block.masked - block.first :] += block.mask
    return torch.softmax(scores, dim=-1)


def _stacked(grouped: Tensor, queries: slice) -> Tensor:
    """Some queries of [groups, heads a group, T, D], those of a group one below the other: [groups, ..., D]."""
    return grouped[:, :, queries].flatten(1, 2)
