"""Examples of compared answers with what is known of them before a step: mismatched answers, and reference values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from qlora.data.batching.sampler import lengths_of
from qlora.data.example_sequence import ExampleSequence
from qlora.data.types import Example

Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ComparedExample(Example):
    """An example with sides.

    mismatched: its prompts with answers of other records, where an objective needs them. reference: log-probability of
    each side under the reference, where it was computed before.
    """

    mismatched: Example | None = None
    reference: Values | None = None


class ReferencedAnswers(ExampleSequence):
    """Examples with the log-probabilities of their sides, and of their mismatched answers, under the reference."""

    def __init__(self, examples: Sequence[Example], values: Values) -> None:
        """Values [S]: of the sides of each example, then of its mismatched answers, example by example."""
        self._examples, self._values = examples, values
        self._ends = np.cumsum([sum(counts) for counts in answer_counts(examples)])
        assert len(values) == (self._ends[-1] if len(self._ends) else 0)
        self.lengths: npt.NDArray[np.int64] = lengths_of(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def example(self, number: int) -> Example:
        """Example `number` with its values."""
        example = self._examples[number]
        end, mismatched = int(self._ends[number]), mismatched_of(example)
        others = len(mismatched.sides) if mismatched else 0
        own = self._values[end - others - len(example.sides) : end - others]
        beside = _compared(mismatched, None, self._values[end - others : end]) if mismatched else None
        return _compared(example, beside, own)


def _compared(example: Example, mismatched: Example | None, reference: Values) -> ComparedExample:
    values = {field.name: getattr(example, field.name) for field in fields(Example)}
    return ComparedExample(**values, mismatched=mismatched, reference=reference)


def mismatched_of(example: Example) -> Example | None:
    """The prompts of an example with answers of other records, if it has them."""
    return example.mismatched if isinstance(example, ComparedExample) else None


def reference_of(examples: Sequence[Example]) -> Values | None:
    """The values of all sides of `examples` [S], in order; None if they were not computed before."""
    parts = [example.reference for example in examples if isinstance(example, ComparedExample)]
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known and len(known) == len(examples) else None


def answer_counts(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """Sides and mismatched answers of each example."""
    for index in range(len(examples)):
        mismatched = mismatched_of(examples[index])
        yield len(examples[index].sides), len(mismatched.sides) if mismatched else 0
