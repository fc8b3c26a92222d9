"""The micro-batch of an objective that compares answers: sequences, and which trained tokens belong to which answer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.packing import split_documents
from qlora.data.compared import mismatched_of, reference_of
from qlora.data.pairs import with_trained_prompts
from qlora.data.types import CHOSEN, IGNORED, Example
from qlora.utils.send import send

PROMPT = 2  # the role of all other tokens of the chosen conversations, where an objective learns them too


@dataclass(frozen=True)
class SideBatch(Batch):
    """A micro-batch whose trained tokens are those of S answers, one after the other; the prompts may be the last."""

    roles: tuple[int, ...] = ()  # of each answer
    side_tokens: tuple[int, ...] = ()  # trained tokens of each answer
    units: int = 0  # pairs, or answers with a label
    mismatched: "SideBatch | None" = None  # the prompts with answers of other records, where the objective needs them
    reference: Tensor | None = None  # [S], of each answer, where it was computed before

    @property
    def learned_tokens(self) -> int:
        """Tokens of the cross entropy: the trained ones of the chosen answers, and of the prompts."""
        pairs = zip(self.side_tokens, self.roles, strict=True)
        return sum(count for count, role in pairs if role in (CHOSEN, PROMPT))

    @property
    def counts(self) -> tuple[int, ...]:
        """As those of Batch, where the loss is divided by the pairs; and the tokens of the cross entropy."""
        return self.units, self.tokens, self.trained_tokens, self.learned_tokens

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of SideLogProbs.forward."""
        return (*super().arguments, self.side_tokens)

    def without_loss(self) -> "SideBatch":
        """The batch without answers."""
        labels = torch.full_like(self.labels, IGNORED)
        other = None if self.mismatched is None else self.mismatched.without_loss()
        none = None if self.reference is None else self.reference[:0]
        return replace(
            self, labels=labels, tokens=0, roles=(), side_tokens=(), units=0, mismatched=other, reference=none
        )

    def to(self, device: torch.device) -> "SideBatch":
        """The batch on another device."""
        batch = super().to(device)
        assert isinstance(batch, SideBatch)
        mismatched = None if self.mismatched is None else self.mismatched.to(device)
        reference = None if self.reference is None else send(self.reference, device)
        moved = replace(batch, mismatched=mismatched, reference=reference)
        moved.__dict__["trained"] = batch.trained
        return moved


def collate_sides(
    examples: Sequence[Example], pad_id: int, paired: bool, in_one_row: bool, with_prompts: bool = False
) -> SideBatch:
    """Pad `examples` as `collate` does. paired: two sides are a unit. in_one_row: else each document is a row alone.

    with_prompts: all other tokens of the chosen conversations are trained too, under the role PROMPT.
    """
    rows = list(examples) if in_one_row else [row for example in examples for row in split_documents(example)]
    learned = [with_trained_prompts(row) for row in rows] if with_prompts else rows
    batch, length = collate(learned, pad_id), max(map(len, rows))
    sides = [(number * length + side.start, side.role) for number, row in enumerate(rows) for side in row.sides]
    starts = np.array([start for start, _ in sides])
    # A target is of the last side that starts before it.
    side_of_target = np.searchsorted(starts, batch.trained[1].numpy(), side="right") - 1
    roles = [role for _, role in sides]
    if with_prompts:
        answers = np.concatenate([np.pad(row.labels, (0, length - len(row)), constant_values=IGNORED) for row in rows])
        side_of_target[answers[batch.trained[1].numpy()] == IGNORED] = len(sides)
        roles.append(PROMPT)
    tokens = np.bincount(side_of_target, minlength=len(roles))
    others = [other for other in map(mismatched_of, examples) if other is not None]
    reference = reference_of(examples)
    base = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    result = SideBatch(
        **base,
        roles=tuple(roles),
        side_tokens=tuple(tokens.tolist()),
        units=len(sides) // 2 if paired else len(sides),
        mismatched=collate_sides(others, pad_id, paired, in_one_row) if others else None,
        reference=None if reference is None else torch.from_numpy(reference),
    )
    if with_prompts:  # answer by answer, the prompts last
        result.__dict__["trained"] = batch.trained[:, np.argsort(side_of_target, kind="stable")]
    return result
