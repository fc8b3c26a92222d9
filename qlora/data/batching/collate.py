"""Rows put together into the tensors of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora.data.types import IGNORED, Example


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Pads stand on the right, so a causal mask keeps them from every real token."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, -100 on pads and on the first token of every document
    position_ids: Tensor  # [B, T] int64, 0 where a document begins; pads count on
    tokens: int = 0  # without pads
    starts: tuple[tuple[int, ...], ...] = ()  # of each row, where its documents begin
    lengths: tuple[int, ...] = ()  # of each row, without pads

    @property
    def trained_tokens(self) -> int:
        """How many labels bear loss."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        ids, labels, positions = (
            tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.labels, self.position_ids)
        )
        return Batch(ids, labels, positions, self.tokens, self.starts, self.lengths)

    def silent(self) -> "Batch":
        """The same batch with nothing to learn, for a process that has no rows left but must take part."""
        return Batch(self.input_ids, torch.full_like(self.labels, IGNORED), self.position_ids, starts=self.starts)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad `examples` on the right to the longest. Whatever `pad_id` is, pads are known by place, never by id."""
    shape = (len(examples), max(len(example) for example in examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
        for start in example.starts():
            position_ids[row, start:] = np.arange(shape[1] - start)
    labels[position_ids == 0] = IGNORED  # nothing before it, or another document: no prediction to learn from
    ids, targets, positions = (torch.from_numpy(array) for array in (input_ids, labels, position_ids))
    starts = tuple(example.starts() for example in examples)
    lengths = tuple(len(example) for example in examples)
    return Batch(ids, targets, positions, sum(lengths), starts, lengths)
