"""Short rows into full ones by best fit; every document keeps its boundary, its labels and its place of origin."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qlora.data.types import Example

Indices = npt.NDArray[np.int64]


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Put `examples` into rows of at most `max_length` tokens. Deterministic, whatever the hash seed or the machine."""
    return [join([examples[index] for index in group]) for group in best_fit([len(e) for e in examples], max_length)]


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """`arrange` as lists of indices."""
    order, ends = arrange(np.asarray(lengths, dtype=np.int64), room)
    return [group.tolist() for group in np.split(order, ends[:-1])] if len(ends) else []


def arrange(lengths: Indices, room: int) -> tuple[Indices, Indices]:
    """Indices grouped so that each group's lengths sum to at most `room`: best fit, longest first.

    Group i is order[ends[i-1]:ends[i]]. At most 11/9 of the fewest groups possible, plus one (Johnson 1973). A length
    above `room` is a group of its own.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    group_of = np.empty(len(lengths), dtype=np.int64)
    open_at: dict[int, list[int]] = {}  # tokens still free -> groups with so many
    free: list[int] = []  # the keys of open_at, rising
    groups = 0
    for visit, index in enumerate(longest_first):
        length = int(lengths[index])
        place = bisect_left(free, length)
        if place == len(free):
            group, left, groups = groups, room - length, groups + 1
        else:
            left = free[place] - length
            group = open_at[free[place]].pop()
            if not open_at[free[place]]:
                del open_at[free.pop(place)]
        group_of[visit] = group
        if left > 0:
            if left not in open_at:
                insort(free, left)
            open_at.setdefault(left, []).append(group)
    return longest_first[np.argsort(group_of, kind="stable")], np.cumsum(np.bincount(group_of, minlength=groups))


def join(examples: Sequence[Example]) -> Example:
    """One row out of several, in the order given."""
    if len(examples) == 1:
        return examples[0]
    starts = np.cumsum([0, *(len(example) for example in examples[:-1])])
    boundaries = [int(start) + inner for start, e in zip(starts, examples, strict=True) for inner in e.starts()]
    return Example(
        where=f"{examples[0].where} and {len(examples) - 1} more",
        input_ids=np.concatenate([example.input_ids for example in examples]),
        labels=np.concatenate([example.labels for example in examples]),
        boundaries=tuple(boundaries[1:]),
        parts=tuple(part for example in examples for part in (example.parts or (example.where,))),
    )


def split(example: Example) -> list[Example]:
    """The documents of a packed row, each a row again: the inverse of `join`."""
    if not example.boundaries:
        return [example]
    ends = (*example.boundaries, len(example))
    return [
        Example(part, example.input_ids[start:end], example.labels[start:end])
        for part, start, end in zip(example.parts, example.starts(), ends, strict=True)
    ]
