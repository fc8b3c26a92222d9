"""Which tokens of a sequence see which, as dense masks of some queries: for the block kernel of CPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora.data.types import Branch
from qlora.model.sequence_segments import SegmentsBySequence, contexts_of, lengths_of_segments

ALL = 2**62


def flat_segments(segments: SegmentsBySequence, length: int) -> Tensor:
    """Int64 [segments, 2]: start and parent of each segment in the concatenated sequences of `length` tokens."""
    return torch.tensor(
        [
            (index * length + segment.start, index * length + segment.parent if segment.parent >= 0 else -1)
            for index, sequence in enumerate(segments)
            for segment in sequence
        ]
    )


class Visibility:
    """Which tokens of a sequence see which, as dense masks of some queries. `window`: tokens, by position."""

    def __init__(self, segments: Sequence[Branch], length: int, window: int | None) -> None:
        self._starts, self._window = torch.tensor([segment.start for segment in segments]), window
        # The last token of segment j that segment i sees, or -1; of itself all up to the token that looks.
        self._last = torch.full((len(segments), len(segments)), -1).fill_diagonal_(ALL)
        self._positions = torch.arange(length)
        sizes, contexts = lengths_of_segments(segments, length), contexts_of(segments)
        for index, (segment, size, context) in enumerate(zip(segments, sizes, contexts, strict=True)):
            for start, end in context:
                self._last[index, torch.searchsorted(self._starts, start, right=True) - 1] = end - 1
            first = sum(end - start for start, end in context)
            self._positions[segment.start : segment.start + size] = torch.arange(first, first + size)

    def mask(self, start: int, end: int) -> Tensor:
        """Bool [end - start, end]: whether query start + i sees key j."""
        queries, keys = torch.arange(start, end), torch.arange(end)
        owners = [torch.searchsorted(self._starts, tokens, right=True) - 1 for tokens in (queries, keys)]
        visible = keys <= torch.minimum(queries[:, None], self._last[owners[0]][:, owners[1]])
        if self._window is not None:
            visible &= self._positions[:end] > self._positions[start:end, None] - self._window
        return visible
