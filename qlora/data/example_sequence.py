"""Sequences of examples that are built when they are indexed: what slices and negative numbers mean, once for all."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from qlora.data.types import Example


class ExampleSequence(Sequence[Example]):
    """A sequence whose classes say how long it is and build one example."""

    @abstractmethod
    def example(self, number: int) -> Example:
        """Example `number`, from 0 to the length - 1."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """One example, or those of a slice."""
        numbers = range(len(self))[index]
        return self.example(numbers) if isinstance(numbers, int) else [self.example(number) for number in numbers]
