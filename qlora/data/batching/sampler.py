"""Which rows a step sees and which process takes them: pure functions of (seed, epoch, step), nothing to save."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora.data.types import Example

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

WINDOW_STEPS = 64  # by length: so many steps' rows are sorted together, so that epochs still differ
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, splitmix64's own step


def scatter(seed: int, epoch: int, indices: Keys) -> Keys:
    """A pseudo-random 64-bit key for each index (splitmix64's finaliser): the same on every machine and version."""
    with np.errstate(over="ignore"):
        stream = _mix(_mix(_GOLDEN + np.uint64(seed & (2**64 - 1))) + _GOLDEN * np.uint64(epoch + 1))
        return _mix(stream + _GOLDEN * (indices + np.uint64(1)))


def _mix(value: Keys | np.uint64) -> Keys:
    mixed = np.asarray(value, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def steps_per_epoch(count: int, global_batch: int) -> int:
    """Optimizer steps that visit every row once; a last group smaller than `global_batch` is a step too."""
    return -(-count // global_batch)


@dataclass(frozen=True)
class Sampler:
    """The order of a run. kind: shuffle, length (rows of like length in a step, steps shuffled) or sequential."""

    kind: str
    global_batch: int
    seed: int
    _last: list[Any] = field(default_factory=list, compare=False, repr=False)  # rows, epoch, and their order

    def rows(self, train: Sequence[Example], step: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 0 over all epochs, before they are dealt to processes."""
        epoch, place = divmod(step, steps_per_epoch(len(train), self.global_batch))
        first = place * self.global_batch
        return [int(row) for row in self._epoch(train, epoch)[first : first + self.global_batch]]

    def _epoch(self, train: Sequence[Example], epoch: int) -> Indices:
        """All rows of an epoch, worked out once for all of its steps."""
        if not self._last or self._last[0] is not train or self._last[1] != epoch:
            self._last[:] = train, epoch, ORDERS[self.kind](train, self, epoch)
        found: Indices = self._last[2]
        return found


def shuffled(rows: Sequence[Any], order: Sampler, epoch: int) -> Indices:
    """A permutation of the rows, another one in each epoch."""
    return _sorted_by(scatter(order.seed, epoch, np.arange(len(rows), dtype=np.uint64)))


def by_length(rows: Sequence[Example], order: Sampler, epoch: int) -> Indices:
    """Shuffled rows, sorted by length in windows of WINDOW_STEPS steps, a window's full steps shuffled again."""
    places = shuffled(rows, order, epoch)
    lengths = lengths_of(rows)[places]
    windows = np.arange(len(places)) // (WINDOW_STEPS * order.global_batch)
    places = places[np.lexsort((-lengths, windows))]
    full = len(places) // order.global_batch
    steps = np.arange(full, dtype=np.uint64)
    turn = np.lexsort((scatter(order.seed + 1, epoch, steps), steps // np.uint64(WINDOW_STEPS)))
    head = places[: full * order.global_batch].reshape(full, order.global_batch)[turn]
    return np.concatenate([head.ravel(), places[full * order.global_batch :]])


def sequential(rows: Sequence[Any], order: Sampler, epoch: int) -> Indices:
    """The rows as they stand in the files, the same in every epoch."""
    return np.arange(len(rows), dtype=np.int64)


ORDERS: Mapping[str, Callable[[Sequence[Example], Sampler, int], Indices]] = {
    "shuffle": shuffled,
    "length": by_length,
    "sequential": sequential,
}


def lengths_of(rows: Sequence[Example]) -> Indices:
    """Tokens of each row, without making the rows where they know their lengths."""
    known: Indices | None = getattr(rows, "lengths", None)
    return np.array([len(row) for row in rows], dtype=np.int64) if known is None else known


def shares(rows: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The rows of a step dealt to processes with micro-batches of `sizes` rows: of each, longest first, for few pads.

    lengths: tokens of each of `rows`. The longest row left goes to the process with the fewest tokens so far (Graham
    1969) for its size, as long as it has fewer rows than its part. The step's sum does not depend on who takes which.
    """
    world, parts = len(sizes), [-(-len(rows) * size // sum(sizes)) for size in sizes]
    dealt, tokens = [list[int]() for _ in sizes], [0] * world
    for length, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: (-pair[0], pair[1])):
        free = (rank for rank in range(world) if len(dealt[rank]) < parts[rank])
        rank = min(free, key=lambda rank: (tokens[rank] / sizes[rank], rank))
        dealt[rank].append(row)
        tokens[rank] += length
    return dealt


def micro_batches(share: Sequence[int], rows: int, own: int, sizes: Sequence[int]) -> list[list[int]]:
    """One process's `share` of a step of `rows` rows in groups of at most `own`; empty ones where it runs out.

    sizes: of every process, `own` one of them. All get the same number of groups.
    """
    groups = -(-rows // sum(sizes))
    return [list(share[group * own : (group + 1) * own]) for group in range(groups)]


def _sorted_by(keys: Keys) -> Indices:
    return np.argsort(keys, kind="stable").astype(np.int64)
