"""Rows of tokens as views of flat arrays: an Example is made when asked for, so memory does not grow with them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from qlora.data.batching.column_store import Array, Columns
from qlora.data.batching.packing import join
from qlora.data.types import IGNORED, Example

Indices = npt.NDArray[np.int64]

DOCUMENTS = ("ids", "trained", "ends", "where", "where_ends")


class ExampleWriter:
    """Appends examples to the columns of DOCUMENTS."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._tokens = self._letters = self.count = 0

    def add(self, example: Example) -> None:
        """One more document. Labels are kept as flags: they are the token itself or IGNORED."""
        where = np.frombuffer(example.where.encode("utf-8", "surrogateescape"), dtype=np.uint8)
        self._tokens += len(example)
        self._letters += len(where)
        self.count += 1
        self._columns.append("ids", example.input_ids)
        self._columns.append("trained", example.labels != IGNORED)
        self._columns.append("ends", np.array([self._tokens]))
        self._columns.append("where", where)
        self._columns.append("where_ends", np.array([self._letters]))


class ExampleStore(Sequence[Example]):
    """What a DocumentWriter wrote."""

    def __init__(self, columns: Mapping[str, Array]) -> None:
        self._ids, self._trained, self._ends, self._where, self._where_ends = (columns[name] for name in DOCUMENTS)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Document `index`, as it was added."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        span = _span(self._ends, range(len(self))[index])
        ids = np.array(self._ids[span], dtype=np.int32)
        return Example(self.where(index), ids, np.where(self._trained[span], ids, np.int32(IGNORED)))

    def where(self, index: int) -> str:
        """The place document `index` came from."""
        return bytes(self._where[_span(self._where_ends, range(len(self))[index])]).decode("utf-8", "surrogateescape")

    @property
    def lengths(self) -> Indices:
        """Tokens of each document."""
        return np.diff(self._ends, prepend=0)


class SequenceDataset(Sequence[Example]):
    """Rows of one or more documents: row i holds documents order[ends[i-1]:ends[i]]."""

    def __init__(self, documents: ExampleStore, order: Array, ends: Array) -> None:
        self.documents, self._order, self._ends = documents, order, ends

    def __len__(self) -> int:
        return len(self._ends)

    @cached_property
    def lengths(self) -> Indices:
        """Tokens of each row."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.documents.lengths[self._order], np.append(0, self._ends[:-1]))  # type: ignore[no-any-return]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Row `index`, its documents joined."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        span = _span(self._ends, range(len(self))[index])
        return join([self.documents[int(each)] for each in self._order[span]])


def _span(ends: Array, index: int) -> slice:
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))
