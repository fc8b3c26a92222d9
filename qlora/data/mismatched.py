"""Answers beside prompts of other records: what KTO estimates its KL on, without generating anything.

Records are taken in groups of `group` in the order of the data; the mismatched answer of a record is that of the one
before it in its group, of the first one that of the last. So packing, the order of training and the split into
micro-batches do not change it; with groups of its batch size, TRL forms the same ones.
"""

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from qlora.data.batching.dataset import SequenceDataset
from qlora.data.batching.join import join_documents
from qlora.data.compared import ComparedExample
from qlora.data.example_sequence import ExampleSequence
from qlora.data.types import CHOSEN, IGNORED, Example, Side


class MismatchedAnswers(ExampleSequence):
    """Sequences of labeled answers, each a ComparedExample; a mismatched answer is cut off at `max_length`."""

    def __init__(self, sequences: SequenceDataset, max_length: int, group: int) -> None:
        self._sequences, self._max_length = sequences, max_length
        self._other = _others(np.unique(sequences.order), max(2, group))
        self.lengths: npt.NDArray[np.int64] = sequences.lengths

    def __len__(self) -> int:
        return len(self._sequences)

    def example(self, number: int) -> Example:
        """Sequence `number` with its mismatched answers."""
        own, examples = self._sequences[number], self._sequences.examples
        indices = self._sequences.examples_of(number)
        mismatched = [self._pair(examples[index], examples[self._other[index]]) for index in indices]
        values = {field.name: getattr(own, field.name) for field in fields(Example)}
        return ComparedExample(**values, mismatched=join_documents(mismatched))

    def _pair(self, own: Example, other: Example) -> Example:
        """The prompt of one conversation with the answer of another."""
        prompt, answer = int((own.labels != IGNORED).argmax()), int((other.labels != IGNORED).argmax())
        ids = np.concatenate([own.input_ids[:prompt], other.input_ids[answer:]])[: self._max_length]
        labels = np.concatenate([np.full(prompt, IGNORED, np.int32), other.labels[answer:]])[: self._max_length]
        return Example(own.where, ids, labels, sides=(Side(0, CHOSEN),))


def _others(numbers: npt.NDArray[np.int64], group: int) -> Mapping[int, int]:
    """The number of each example -> that of the example whose answer it gets; a last one alone joins a group."""
    starts = [*range(0, len(numbers), group)]
    if len(numbers) - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    groups = np.split(numbers, starts[1:])
    return {int(number): int(other) for part in groups for number, other in zip(part, np.roll(part, 1), strict=True)}
