"""The keys that each segment of a micro-batch sees, as indices on the device, for the kernel of GPUs."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.model.sequence_segments import SegmentsBySequence, contexts_of, lengths_of_segments
from qlora.utils.send import send


class SegmentBounds(NamedTuple):
    """Bounds of segments in concatenated sequences, int32 [segments + 1], and the tokens of the longest."""

    cu_seqlens: Tensor
    longest: int


class SegmentContexts(NamedTuple):
    """The keys that segments see, their own included: indices into the concatenated sequences, and bounds."""

    indices: Tensor  # int64, on the device
    bounds: SegmentBounds


def contexts_on_device(segments: SegmentsBySequence, length: int, device: torch.device) -> SegmentContexts:
    """The keys of every segment of sequences of `length` tokens, in order."""
    spans = []
    for index, sequence in enumerate(segments):
        sizes = lengths_of_segments(sequence, length)
        for segment, size, context in zip(sequence, sizes, contexts_of(sequence), strict=True):
            own = [*context, (segment.start, segment.start + size)]
            spans.append([(index * length + start, index * length + end) for start, end in own])
    sizes = [sum(end - start for start, end in own) for own in spans]
    indices = torch.cat([torch.arange(start, end) for own in spans for start, end in own])
    bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
    return SegmentContexts(send(indices, device), SegmentBounds(send(bounds, device), max(sizes)))
