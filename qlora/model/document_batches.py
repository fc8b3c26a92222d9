"""The documents of packed sequences as batches of rows: for layers that carry a state from token to token.

Documents of similar length share a batch, padded on the right. The indices are computed once for a micro-batch, on the
host, and all layers use them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.data.types import Layout
from qlora.utils.send import send

SMALL_PADDING = 256  # tokens of padding that a batch may have whatever its size: less than another call costs
LARGEST_PADDING = 1 / 3  # of the tokens of a batch


@dataclass(frozen=True, eq=False)
class DocumentBatches:
    """Where the tokens of a micro-batch [B, T] are in batches of its documents, and back."""

    shape: tuple[int, int]  # B, T
    tokens: tuple[Tensor, ...]  # of each batch, int64 [documents, longest]: indices into B * T; padding repeats a token
    places: Tensor  # int64 [B * T]: indices into the concatenated batches; padding has the place of the token before it

    def cut(self, values: Tensor) -> list[Tensor]:
        """The values [B or 1, T, ...] of each batch [documents, longest, ...]."""
        flat = values.expand(self.shape[0], *values.shape[1:]).flatten(0, 1)
        return [flat.index_select(0, tokens.flatten()).unflatten(0, tokens.shape) for tokens in self.tokens]

    def join(self, batches: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`: the values [B, T, ...] of all batches."""
        flat = torch.cat([batch.flatten(0, 1) for batch in batches])
        return flat.index_select(0, self.places).unflatten(0, self.shape)  # type: ignore[no-any-return]


def batches_of(layout: Layout, length: int, device: torch.device) -> DocumentBatches | None:
    """The documents of sequences padded to `length` tokens; None if each sequence is one document.

    ValueError for prefix trees: a branch continues the state in the middle of a document.
    """
    if any(layout.branches):
        raise ValueError("recurrent layers do not take prefix trees")
    if all(len(starts) < 2 for starts in layout.starts):
        return None
    spans = _spans(layout, length)
    tokens, places = list[Tensor](), torch.full((len(layout.starts) * length,), -1)
    count = 0  # places in the batches so far
    for group in similar_lengths([size for _, size in spans]):
        firsts, sizes = torch.tensor([spans[index] for index in group]).unbind(1)
        offsets = torch.arange(spans[group[0]][1]).expand(len(group), -1)
        tokens.append(firsts[:, None] + offsets.minimum(sizes[:, None] - 1))
        is_token = offsets < sizes[:, None]
        places[tokens[-1][is_token]] = is_token.flatten().nonzero()[:, 0] + count
        count += is_token.numel()
    before = torch.arange(len(places)).where(places >= 0, 0).cummax(0).values
    batches = tuple(send(batch, device) for batch in tokens)
    return DocumentBatches((len(layout.starts), length), batches, send(places[before], device))


def _spans(layout: Layout, length: int) -> list[tuple[int, int]]:
    """First token of each document in the flat sequences, and its length."""
    spans = list[tuple[int, int]]()
    for row, (starts, end) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        ends = (*starts[1:], end)
        spans += [(row * length + start, stop - start) for start, stop in zip(starts, ends, strict=True)]
    return spans


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of documents in groups, the longest first; the padding of a group is limited by the constants above."""
    groups = list[list[int]]()
    padding = tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        added = lengths[groups[-1][0]] - lengths[index] if groups else 0
        limit = max(SMALL_PADDING, LARGEST_PADDING * (tokens + lengths[index]))
        if not groups or padding + added > limit:
            groups.append([])
            added = padding = tokens = 0
        groups[-1].append(index)
        padding, tokens = padding + added, tokens + lengths[index]
    return groups
