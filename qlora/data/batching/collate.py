"""Collate: sequences padded into the tensors of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.types import IGNORED, PLAIN_LAYOUT, Example, Layout
from qlora.utils.send import send


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right: the causal mask hides the padding from every token."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, -100 for padding and for the first token of every document
    position_ids: Tensor  # [B, T] int64, 0 where a document starts; padding continues the last segment
    tokens: int = 0  # without padding
    layout: Layout = PLAIN_LAYOUT

    @cached_property
    def trained(self) -> Tensor:
        """[2, N] int64, in the flattened [B * T]: tokens that predict, and the tokens that they predict and bear loss.

        Found on the host, before `to`. The first token of a branch is predicted by its parent.
        """
        bears_loss = self.labels != IGNORED
        bears_loss[:, 0] = False
        targets = bears_loss.flatten().nonzero().squeeze(1)
        return torch.stack([self._predecessors[targets] if self.layout.branches else targets - 1, targets])

    @property
    def _predecessors(self) -> Tensor:
        """[B * T]: the token that each token follows."""
        before = torch.arange(self.labels.numel()) - 1
        for row, branches in enumerate(self.layout.branches):
            for start, parent in branches:
                before[row * self.labels.shape[1] + start] = row * self.labels.shape[1] + parent
        return before

    @property
    def trained_tokens(self) -> int:
        """Number of labels that bear loss."""
        return self.trained.shape[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """What a step's loss is divided by, tokens without padding, tokens that bear loss; a step adds them up."""
        return self.trained_tokens, self.tokens, self.trained_tokens

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of TokenLoss.forward."""
        return self.input_ids, self.labels, self.position_ids, self.layout, self.trained

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device; the host does not wait for a GPU."""
        ids, labels, positions, trained = (
            send(tensor, device) for tensor in (self.input_ids, self.labels, self.position_ids, self.trained)
        )
        batch = replace(self, input_ids=ids, labels=labels, position_ids=positions)
        batch.__dict__["trained"] = trained  # else the device would be asked for the positions
        return batch

    def without_loss(self) -> "Batch":
        """The batch without labels, for a rank that has no sequences left and must still take part."""
        return replace(self, labels=torch.full_like(self.labels, IGNORED), tokens=0)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad `examples` on the right to the longest. Padding is known by position: `pad_id` may be a trained token."""
    shape = (len(examples), max(len(example) for example in examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
        _count_positions(position_ids[row], example)
    labels[position_ids == 0] = IGNORED  # a document's first token is predicted from nothing
    ids, targets, positions = (torch.from_numpy(array) for array in (input_ids, labels, position_ids))
    starts = tuple(example.document_starts() for example in examples)
    lengths = tuple(len(example) for example in examples)
    branches = tuple(example.branches for example in examples)
    layout = Layout(starts, lengths, branches if any(branches) else ())
    return Batch(ids, targets, positions, sum(lengths), layout)


def _count_positions(positions: "np.ndarray[Any, np.dtype[np.int64]]", example: Example) -> None:
    """Write the positions of a sequence: from 0 in each document; a branch goes on from its parent."""
    segments = example.segments()
    ends = [*(segment.start for segment in segments[1:]), len(positions)]
    for (start, parent), end in zip(segments, ends, strict=True):
        first = int(positions[parent]) + 1 if parent >= 0 else 0
        positions[start:end] = np.arange(first, first + end - start)
