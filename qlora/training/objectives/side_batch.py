"""The micro-batch of an objective that compares answers: sequences, and which trained tokens belong to which answer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.packing import split_documents
from qlora.data.mismatched import FeedbackExample
from qlora.data.types import CHOSEN, IGNORED, Example


@dataclass(frozen=True)
class SideBatch(Batch):
    """A micro-batch whose trained tokens are those of S answers, one after the other."""

    roles: tuple[int, ...] = ()  # of each answer
    side_tokens: tuple[int, ...] = ()  # trained tokens of each answer
    units: int = 0  # pairs, or answers with a label
    mismatched: "SideBatch | None" = None  # the prompts with answers of other records, where the objective needs them

    @property
    def chosen_tokens(self) -> int:
        """Trained tokens of the chosen answers."""
        return sum(count for count, role in zip(self.side_tokens, self.roles, strict=True) if role == CHOSEN)

    @property
    def counts(self) -> tuple[int, ...]:
        """As those of Batch, where the loss is divided by the pairs; and the trained tokens of chosen answers."""
        return self.units, self.tokens, self.trained_tokens, self.chosen_tokens

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of SideLogProbs.forward."""
        return (*super().arguments, self.side_tokens)

    def without_loss(self) -> "SideBatch":
        """The batch without answers."""
        labels = torch.full_like(self.labels, IGNORED)
        other = None if self.mismatched is None else self.mismatched.without_loss()
        return replace(self, labels=labels, tokens=0, roles=(), side_tokens=(), units=0, mismatched=other)

    def to(self, device: torch.device) -> "SideBatch":
        """The batch on another device."""
        batch = super().to(device)
        assert isinstance(batch, SideBatch)
        if self.mismatched is None:
            return batch
        moved = replace(batch, mismatched=self.mismatched.to(device))
        moved.__dict__["trained"] = batch.trained
        return moved


def collate_sides(examples: Sequence[Example], pad_id: int, paired: bool, in_one_row: bool) -> SideBatch:
    """Pad `examples` as `collate` does. paired: two sides are a unit. in_one_row: else each document is a row alone."""
    rows = list(examples) if in_one_row else [row for example in examples for row in split_documents(example)]
    batch = collate(rows, pad_id)
    length = batch.input_ids.shape[1]
    sides = [(number * length + side.start, side.role) for number, row in enumerate(rows) for side in row.sides]
    starts = np.array([start for start, _ in sides])
    # A target is of the last side that starts before it.
    side_of_target = np.searchsorted(starts, batch.trained[1].numpy(), side="right") - 1
    tokens = np.bincount(side_of_target, minlength=len(sides))
    others = [row.mismatched for row in examples if isinstance(row, FeedbackExample) and row.mismatched is not None]
    base = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    return SideBatch(
        **base,
        roles=tuple(role for _, role in sides),
        side_tokens=tuple(tokens.tolist()),
        units=len(sides) // 2 if paired else len(sides),
        mismatched=collate_sides(others, pad_id, paired, in_one_row) if others else None,
    )
