"""Collate: sequences padded into the tensors of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.types import IGNORED, Example
from qlora.utils.send import send


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right: the causal mask hides the padding from every token."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, -100 for padding and for the first token of every document
    position_ids: Tensor  # [B, T] int64, 0 where a document starts; padding continues the last document
    tokens: int = 0  # without padding
    document_starts: tuple[tuple[int, ...], ...] = ()  # for each sequence, where its documents start
    lengths: tuple[int, ...] = ()  # tokens of each sequence, without padding

    @cached_property
    def trained(self) -> Tensor:
        """[N] int64: positions in the flattened [B * T] whose next token bears loss. Found on the host, before `to`."""
        bears_loss = self.labels != IGNORED
        bears_loss[:, 0] = False
        return bears_loss.flatten().nonzero().squeeze(1) - 1

    @property
    def trained_tokens(self) -> int:
        """Number of labels that bear loss."""
        return len(self.trained)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of TokenLoss.forward."""
        starts, lengths = self.document_starts, self.lengths
        return self.input_ids, self.labels, self.position_ids, starts, lengths, self.trained

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device; the host does not wait for a GPU."""
        ids, labels, positions, trained = (
            send(tensor, device) for tensor in (self.input_ids, self.labels, self.position_ids, self.trained)
        )
        batch = Batch(ids, labels, positions, self.tokens, self.document_starts, self.lengths)
        batch.__dict__["trained"] = trained  # else the device would be asked for the positions
        return batch

    def without_loss(self) -> "Batch":
        """The batch without labels, for a rank that has no sequences left and must still take part."""
        ignored = torch.full_like(self.labels, IGNORED)
        return Batch(self.input_ids, ignored, self.position_ids, document_starts=self.document_starts)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad `examples` on the right to the longest. Padding is known by position: `pad_id` may be a trained token."""
    shape = (len(examples), max(len(example) for example in examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
        for start in example.document_starts():
            position_ids[row, start:] = np.arange(shape[1] - start)
    labels[position_ids == 0] = IGNORED  # a document's first token is predicted from nothing
    ids, targets, positions = (torch.from_numpy(array) for array in (input_ids, labels, position_ids))
    starts = tuple(example.document_starts() for example in examples)
    lengths = tuple(len(example) for example in examples)
    return Batch(ids, targets, positions, sum(lengths), starts, lengths)
