"""Answers beside prompts of other records: what KTO estimates its KL on, without generating anything.

The mismatched answer of an example is that of the next one in the data set, whatever the order of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import overload

import numpy as np
import numpy.typing as npt

from qlora.data.batching.join import join_documents
from qlora.data.batching.packing import split_documents
from qlora.data.batching.sampler import lengths_of
from qlora.data.types import CHOSEN, IGNORED, Example, Side


@dataclass(frozen=True, slots=True, eq=False)
class FeedbackExample(Example):
    """An example with labeled answers, and its prompts with answers of other records."""

    mismatched: Example | None = None


class MismatchedAnswers(Sequence[Example]):
    """Examples of labeled answers, each a FeedbackExample; a mismatched conversation is cut off at `max_length`."""

    def __init__(self, examples: Sequence[Example], max_length: int) -> None:
        self._examples, self._max_length = examples, max_length
        self.lengths: npt.NDArray[np.int64] = lengths_of(examples)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Example `index` with its mismatched answers."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        own = self._examples[number]
        others = split_documents(self._examples[(number + 1) % len(self)])
        documents = split_documents(own)
        if len(self) == 1:  # a packed sequence alone: the answers of its own documents, moved by one
            others = [*others[1:], others[0]]
        mismatched = [self._pair(document, others[k % len(others)]) for k, document in enumerate(documents)]
        values = {field.name: getattr(own, field.name) for field in fields(Example)}
        return FeedbackExample(**values, mismatched=join_documents(mismatched))

    def _pair(self, own: Example, other: Example) -> Example:
        """The prompt of one conversation with the answer of another."""
        prompt, answer = int((own.labels != IGNORED).argmax()), int((other.labels != IGNORED).argmax())
        ids = np.concatenate([own.input_ids[:prompt], other.input_ids[answer:]])[: self._max_length]
        labels = np.concatenate([np.full(prompt, IGNORED, np.int32), other.labels[answer:]])[: self._max_length]
        return Example(own.where, ids, labels, sides=(Side(0, CHOSEN),))
