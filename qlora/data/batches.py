"""Which rows a step sees, as pure functions of (seed, epoch, step), and rows put together into tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlora.data.types import IGNORED, Example


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Pads stand on the right, so a causal mask keeps them from every real token."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, -100 on pads and on the first token of every document
    position_ids: Tensor  # [B, T] int64, 0 where a document begins; pads count on
    tokens: int = 0  # without pads
    starts: tuple[tuple[int, ...], ...] = ()  # of each row, where its documents begin

    @property
    def trained_tokens(self) -> int:
        """How many labels bear loss."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        ids, labels, positions = (
            tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.labels, self.position_ids)
        )
        return Batch(ids, labels, positions, self.tokens, self.starts)

    def silent(self) -> "Batch":
        """The same batch with nothing to learn, for a process that has no rows left but must take part."""
        return Batch(self.input_ids, torch.full_like(self.labels, IGNORED), self.position_ids, starts=self.starts)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, splitmix64's own step


def scatter(seed: int, epoch: int, indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A pseudo-random 64-bit key for each index (splitmix64's finaliser): the same on every machine and version."""
    with np.errstate(over="ignore"):
        stream = _mix(_mix(_GOLDEN + np.uint64(seed & (2**64 - 1))) + _GOLDEN * np.uint64(epoch + 1))
        return _mix(stream + _GOLDEN * (indices + np.uint64(1)))


def _mix(value: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    mixed = np.asarray(value, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits its `count` rows: a permutation [count]."""
    return np.argsort(scatter(seed, epoch, np.arange(count, dtype=np.uint64)), kind="stable").astype(np.int64)


def steps_per_epoch(count: int, global_batch: int) -> int:
    """Optimizer steps that visit every row once; a last group smaller than `global_batch` is a step too."""
    return -(-count // global_batch)


def rows_of_step(count: int, global_batch: int, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step`, counted from 0 over all epochs, before they are dealt to processes."""
    epoch, place = divmod(step, steps_per_epoch(count, global_batch))
    first = place * global_batch
    return [int(row) for row in epoch_order(count, seed, epoch)[first : first + global_batch]]


def by_length(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The rows of a step, longest first: dealt out so, a micro-batch has few pads and ranks have about as many tokens.

    lengths: tokens of each of `rows`. The step's sum does not depend on the order within it.
    """
    return [row for _, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: (-pair[0], pair[1]))]


def micro_batches(rows: Sequence[int], micro_batch: int, rank: int, world: int) -> list[list[int]]:
    """A rank's share of a step's rows, in groups of at most `micro_batch`.

    Every rank gets the same number of groups; where rows run out the last ones are empty.
    """
    groups = -(-len(rows[::world]) // micro_batch)  # rank 0 has the most rows
    mine = list(rows[rank::world])
    return [mine[group * micro_batch : (group + 1) * micro_batch] for group in range(groups)]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad `examples` on the right to the longest. Whatever `pad_id` is, pads are known by place, never by id."""
    shape = (len(examples), max(len(example) for example in examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
        for start in example.starts():
            position_ids[row, start:] = np.arange(shape[1] - start)
    labels[position_ids == 0] = IGNORED  # nothing before it, or another document: no prediction to learn from
    ids, targets, positions = (torch.from_numpy(array) for array in (input_ids, labels, position_ids))
    starts = tuple(example.starts() for example in examples)
    return Batch(ids, targets, positions, sum(len(example) for example in examples), starts)
