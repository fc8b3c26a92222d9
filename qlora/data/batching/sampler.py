"""The sampler: which sequences a step trains and which rank gets them, pure functions of (seed, epoch, step).

There is no state to save in a checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora.data.types import Example

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

WINDOW_STEPS = 64  # order `length` sorts the sequences of so many steps together, so that epochs still differ
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, the increment of splitmix64


def random_keys(seed: int, epoch: int, indices: Keys) -> Keys:
    """A pseudo-random 64-bit key for each index (finalizer of splitmix64), the same on every machine and version."""
    with np.errstate(over="ignore"):
        stream = _mix(_mix(_GOLDEN + np.uint64(seed & (2**64 - 1))) + _GOLDEN * np.uint64(epoch + 1))
        return _mix(stream + _GOLDEN * (indices + np.uint64(1)))


def _mix(value: Keys | np.uint64) -> Keys:
    mixed = np.asarray(value, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def steps_per_epoch(count: int, global_batch: int) -> int:
    """Optimizer steps that train `count` sequences once. A last group below `global_batch` is a step too."""
    return -(-count // global_batch)


@dataclass(frozen=True)
class Sampler:
    """The order of sequences. kind: shuffle, length (similar lengths in a step, steps shuffled) or sequential."""

    kind: str
    global_batch: int
    seed: int
    _cache: list[Any] = field(default_factory=list, compare=False, repr=False)  # sequences, epoch, order

    def indices(self, sequences: Sequence[Example], step: int) -> list[int]:
        """The sequences of optimizer step `step`, counted from 0 over all epochs, for all ranks together."""
        epoch, step_of_epoch = divmod(step, steps_per_epoch(len(sequences), self.global_batch))
        first = step_of_epoch * self.global_batch
        return [int(index) for index in self._epoch(sequences, epoch)[first : first + self.global_batch]]

    def _epoch(self, sequences: Sequence[Example], epoch: int) -> Indices:
        """The order of an epoch, computed once for all of its steps."""
        if not self._cache or self._cache[0] is not sequences or self._cache[1] != epoch:
            self._cache[:] = sequences, epoch, ORDERS[self.kind](sequences, self, epoch)
        order: Indices = self._cache[2]
        return order


def shuffled(sequences: Sequence[Any], sampler: Sampler, epoch: int) -> Indices:
    """A permutation of the sequences, a different one in each epoch."""
    keys = random_keys(sampler.seed, epoch, np.arange(len(sequences), dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64)


def by_length(sequences: Sequence[Example], sampler: Sampler, epoch: int) -> Indices:
    """Shuffled sequences, sorted by length in windows of WINDOW_STEPS steps; then the full steps are shuffled."""
    order = shuffled(sequences, sampler, epoch)
    lengths = lengths_of(sequences)[order]
    windows = np.arange(len(order)) // (WINDOW_STEPS * sampler.global_batch)
    order = order[np.lexsort((-lengths, windows))]
    full = len(order) // sampler.global_batch
    steps = np.arange(full, dtype=np.uint64)
    step_order = np.lexsort((random_keys(sampler.seed + 1, epoch, steps), steps // np.uint64(WINDOW_STEPS)))
    head = order[: full * sampler.global_batch].reshape(full, sampler.global_batch)[step_order]
    return np.concatenate([head.ravel(), order[full * sampler.global_batch :]])


def sequential(sequences: Sequence[Any], sampler: Sampler, epoch: int) -> Indices:
    """The order of the files, the same in every epoch."""
    return np.arange(len(sequences), dtype=np.int64)


ORDERS: Mapping[str, Callable[[Sequence[Example], Sampler, int], Indices]] = {
    "shuffle": shuffled,
    "length": by_length,
    "sequential": sequential,
}


def lengths_of(sequences: Sequence[Example]) -> Indices:
    """Tokens of each sequence, read from `sequences.lengths` if it has them."""
    lengths: Indices | None = getattr(sequences, "lengths", None)
    return np.array([len(sequence) for sequence in sequences], dtype=np.int64) if lengths is None else lengths


def split_across_ranks(indices: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The sequences of a step for each rank, longest first, so that micro-batches need little padding.

    lengths: tokens of each of `indices`. sizes: of each rank's micro-batch. The longest sequence left goes
    to the rank with the fewest tokens relative to its size (Graham 1969), up to the rank's number of sequences. The sum
    of the step's gradients does not depend on the split.
    """
    world = len(sizes)
    limits = [-(-len(indices) * size // sum(sizes)) for size in sizes]
    split, tokens = [list[int]() for _ in sizes], [0] * world
    for length, index in sorted(zip(lengths, indices, strict=True), key=lambda pair: (-pair[0], pair[1])):
        free = (rank for rank in range(world) if len(split[rank]) < limits[rank])
        rank = min(free, key=lambda rank: (tokens[rank] / sizes[rank], rank))
        split[rank].append(index)
        tokens[rank] += length
    return split


def micro_batches(indices: Sequence[int], step_size: int, size: int, sizes: Sequence[int]) -> list[list[int]]:
    """One rank's sequences of a step in micro-batches of at most `size`; empty ones where it has no more.

    step_size: sequences of the step on all ranks. sizes: every rank's `size`. All ranks get the same number of
    micro-batches.
    """
    count = -(-step_size // sum(sizes))
    return [list(indices[number * size : (number + 1) * size]) for number in range(count)]
