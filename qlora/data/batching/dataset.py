"""Data sets of examples and sequences, as views of flat arrays: an Example is built when it is indexed.

So memory does not grow with the number of examples.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qlora.data.batching.column_store import Array, Columns
from qlora.data.batching.join import join_documents
from qlora.data.example_sequence import ExampleSequence
from qlora.data.types import IGNORED, Branch, Example, Side

Indices = npt.NDArray[np.int64]

_SCANNED = 2**22  # token ids of a memory map looked at at a time
EXAMPLE_COLUMNS = ("ids", "trained", "ends", "branches", "branch_ends", "sides", "side_ends", "where", "where_ends")


class ExampleWriter:
    """Appends examples to EXAMPLE_COLUMNS."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._tokens = self._branches = self._sides = self._where_bytes = self.count = 0

    def add(self, example: Example) -> None:
        """Append one example. Labels are stored as flags: each is the token itself or IGNORED."""
        columns, where = self._columns, example.where.encode("utf-8", "surrogateescape")
        self._tokens += len(example)
        self._branches += len(example.branches)
        self._sides += len(example.sides)
        self._where_bytes += len(where)
        self.count += 1
        columns.append("ids", example.input_ids)
        columns.append("trained", example.labels != IGNORED)
        columns.append_number("ends", self._tokens)
        if example.branches:
            columns.append("branches", np.array(example.branches, dtype=np.int64).ravel())
        columns.append_number("branch_ends", self._branches)
        if example.sides:
            columns.append("sides", np.array(example.sides, dtype=np.int64).ravel())
        columns.append_number("side_ends", self._sides)
        columns.append_bytes("where", where)
        columns.append_number("where_ends", self._where_bytes)


class ExampleStore(ExampleSequence):
    """The examples that an ExampleWriter wrote."""

    def __init__(self, columns: Mapping[str, Array]) -> None:
        self._ids, self._trained, self._ends, branches, self._branch_ends, *others = (
            columns[name] for name in EXAMPLE_COLUMNS
        )
        sides, self._side_ends, self._where, self._where_ends = others
        self._branches, self._sides = branches.reshape(-1, 2), sides.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._ends)

    def example(self, number: int) -> Example:
        """Example `number`, in the order of writing."""
        span = _span(self._ends, number)
        ids = np.array(self._ids[span], dtype=np.int32)
        labels = np.where(self._trained[span], ids, np.int32(IGNORED))
        where, branches, sides = self.where(number), self.branches(number), self.sides(number)
        # Sides that share no prefix are documents.
        boundaries = () if branches else tuple(side.start for side in sides[1:])
        origins = (where,) * len(sides) if boundaries else ()
        return Example(where, ids, labels, boundaries, origins, branches, sides)

    def first_with_id_from(self, limit: int) -> tuple[int, int] | None:
        """The first example with a token id of at least `limit`, and that id; None if there is none."""
        for start in range(0, len(self._ids), _SCANNED):
            chunk = self._ids[start : start + _SCANNED]
            if chunk.max() >= limit:
                position = start + int((chunk >= limit).argmax())
                return int(np.searchsorted(self._ends, position, side="right")), int(self._ids[position])
        return None

    def branches(self, index: int) -> tuple[Branch, ...]:
        """The branches of example `index`."""
        pairs = self._branches[_span(self._branch_ends, range(len(self))[index])]
        return tuple(Branch(start, parent) for start, parent in pairs.tolist())

    def sides(self, index: int) -> tuple[Side, ...]:
        """The sides of example `index`."""
        pairs = self._sides[_span(self._side_ends, range(len(self))[index])]
        return tuple(Side(start, role) for start, role in pairs.tolist())

    def where(self, index: int) -> str:
        """The file:line of example `index`."""
        return bytes(self._where[_span(self._where_ends, range(len(self))[index])]).decode("utf-8", "surrogateescape")

    @property
    def lengths(self) -> Indices:
        """Tokens of each example."""
        return np.diff(self._ends, prepend=0)


class SequenceDataset(ExampleSequence):
    """Sequences of one or more examples: sequence i joins the examples order[ends[i-1]:ends[i]]."""

    def __init__(self, examples: ExampleStore, order: Array, ends: Array) -> None:
        self.examples, self.order, self._ends = examples, order, ends

    def __len__(self) -> int:
        return len(self._ends)

    @cached_property
    def lengths(self) -> Indices:
        """Tokens of each sequence."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.examples.lengths[self.order], np.append(0, self._ends[:-1]))  # type: ignore[no-any-return]

    def example(self, number: int) -> Example:
        """Sequence `number`, its examples joined."""
        return join_documents([self.examples[index] for index in self.examples_of(number)])

    def examples_of(self, index: int) -> list[int]:
        """The numbers of the examples that sequence `index` joins."""
        return self.order[_span(self._ends, range(len(self))[index])].tolist()  # type: ignore[no-any-return]


def _span(ends: Array, index: int) -> slice:
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))
