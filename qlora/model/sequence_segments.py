"""Segments of a packed sequence and what each token of them sees: documents, and branches that continue a parent token.

A token sees the tokens of its own segment up to itself, the parent of its segment, and all that the parent sees.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qlora.data.types import Branch

Span = tuple[int, int]  # first token, and the one after the last
SegmentsBySequence = tuple[tuple[Branch, ...], ...]


def segments_of_sequences(starts: Sequence[Sequence[int]], branches: Sequence[Sequence[Branch]]) -> SegmentsBySequence:
    """The segments of each sequence, ascending, from its document starts and its branches."""
    documents = [[Branch(start, -1) for start in sequence] for sequence in starts]
    more = branches or [()] * len(documents)
    return tuple(tuple(sorted([*own, *others])) for own, others in zip(documents, more, strict=True))


def contexts_of(segments: Sequence[Branch]) -> list[list[Span]]:
    """For each segment the spans of the tokens that it sees before itself, from the first of its document on."""
    starts, contexts = [segment.start for segment in segments], list[list[Span]]()
    for segment in segments:
        owner = bisect_right(starts, segment.parent) - 1
        contexts.append([*contexts[owner], (starts[owner], segment.parent + 1)] if segment.parent >= 0 else [])
    return contexts


def with_contexts(tensor: Tensor, segments: Sequence[Branch]) -> list[Tensor]:
    """The keys or values [B, G, T, D] of each segment, with those that it sees before itself."""
    length = tensor.shape[2]
    sizes = lengths_of_segments(segments, length)
    own = [(segment.start, segment.start + size) for segment, size in zip(segments, sizes, strict=True)]
    spans = [[*context, span] for context, span in zip(contexts_of(segments), own, strict=True)]
    cuts = sorted({0, length, *(bound for segment in spans for span in segment for bound in span)})
    parts = tensor.split([after - before for before, after in pairwise(cuts)], dim=2)
    at = {cut: index for index, cut in enumerate(cuts)}
    seen = [[part for start, end in segment for part in parts[at[start] : at[end]]] for segment in spans]
    return [torch.cat(segment, dim=2) if len(segment) > 1 else segment[0] for segment in seen]


def lengths_of_segments(segments: Sequence[Branch], length: int) -> list[int]:
    """Tokens of each segment of a sequence of `length` tokens; padding belongs to the last one."""
    return [after - before for before, after in pairwise([*(segment.start for segment in segments), length])]
