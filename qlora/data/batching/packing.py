"""Packing: short examples into sequences of up to max_length tokens by best fit. Documents keep labels and origins."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qlora.data.batching.join import join_documents
from qlora.data.types import Branch, Example, Side

Indices = npt.NDArray[np.int64]


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """`examples` packed into sequences. Deterministic on every machine, whatever the hash seed."""
    groups = best_fit_groups([len(example) for example in examples], max_length)
    return [join_documents([examples[index] for index in group]) for group in groups]


def best_fit_groups(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """`best_fit` as lists of indices."""
    order, ends = best_fit(np.asarray(lengths, dtype=np.int64), max_length)
    return [group.tolist() for group in np.split(order, ends[:-1])] if len(ends) else []


def best_fit(lengths: Indices, max_length: int) -> tuple[Indices, Indices]:
    """Indices grouped so that the lengths of each group sum to at most `max_length`: best fit, longest first.

    Returns order and ends; group i is order[ends[i-1]:ends[i]]. There are at most 11/9 times the fewest possible groups
    plus one (Johnson 1973). A length above `max_length` is a group of its own.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    group_of = np.empty(len(lengths), dtype=np.int64)
    open_groups: dict[int, list[int]] = {}  # free tokens -> groups with so many
    free: list[int] = []  # the keys of open_groups, ascending
    groups = 0
    for rank, index in enumerate(longest_first):
        length = int(lengths[index])
        best = bisect_left(free, length)
        if best == len(free):
            group, left, groups = groups, max_length - length, groups + 1
        else:
            left = free[best] - length
            group = open_groups[free[best]].pop()
            if not open_groups[free[best]]:
                del open_groups[free.pop(best)]
        group_of[rank] = group
        if left > 0:
            if left not in open_groups:
                insort(free, left)
            open_groups.setdefault(left, []).append(group)
    return longest_first[np.argsort(group_of, kind="stable")], np.cumsum(np.bincount(group_of, minlength=groups))


def split_documents(sequence: Example) -> list[Example]:
    """The documents of a packed sequence as examples: the inverse of `join_documents`."""
    if not sequence.boundaries:
        return [sequence]
    ends = (*sequence.boundaries, len(sequence))
    spans = zip(sequence.origins, sequence.document_starts(), ends, strict=True)
    return [_document(sequence, origin, start, end) for origin, start, end in spans]


def _document(sequence: Example, origin: str, start: int, end: int) -> Example:
    """The document start..end as an example, with its branches counted from its start."""
    own = (branch for branch in sequence.branches if start <= branch.start < end)
    branches = tuple(Branch(branch.start - start, max(-1, branch.parent - start)) for branch in own)
    sides = tuple(Side(side.start - start, side.role) for side in sequence.sides if start <= side.start < end)
    ids, labels = sequence.input_ids[start:end], sequence.labels[start:end]
    return Example(origin, ids, labels, branches=branches, sides=sides)
