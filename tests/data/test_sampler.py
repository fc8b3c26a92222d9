"""The sampler: a pure function that trains every sequence once an epoch and splits tokens evenly across ranks."""

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data import Data
from qlora.data.batching.sampler import (
    ORDERS,
    WINDOW_STEPS,
    Sampler,
    lengths_of,
    micro_batches,
    shuffled,
    split_across_ranks,
    steps_per_epoch,
)
from qlora.data.types import Example

seeds = st.integers(0, 2**64 - 1)
EACH_ORDER = pytest.mark.parametrize("kind", ORDERS)


def make_sequences(lengths: Iterable[int]) -> list[Example]:
    return [Example(str(i), np.ones(length, np.int32), np.ones(length, np.int32)) for i, length in enumerate(lengths)]


def epoch_of(sampler: Sampler, sequences: Sequence[Example], epoch: int = 0) -> list[int]:
    steps = steps_per_epoch(len(sequences), sampler.global_batch)
    return [i for step in range(epoch * steps, (epoch + 1) * steps) for i in sampler.indices(sequences, step)]


@EACH_ORDER
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=300),
    global_batch=st.integers(1, 17),
    seed=seeds,
    epoch=st.integers(0, 9),
)
def test_an_epoch_trains_every_sequence_once_in_full_steps_but_the_last(
    kind: str, lengths: list[int], global_batch: int, seed: int, epoch: int
) -> None:
    sequences, sampler = make_sequences(lengths), Sampler(kind, global_batch, seed)
    indices = epoch_of(sampler, sequences, epoch)
    assert sorted(indices) == list(range(len(sequences)))
    assert indices == epoch_of(Sampler(kind, global_batch, seed), make_sequences(lengths), epoch)
    steps = steps_per_epoch(len(sequences), global_batch)
    sizes = [len(sampler.indices(sequences, epoch * steps + step)) for step in range(steps)]
    assert all(size == global_batch for size in sizes[:-1]) and 0 < sizes[-1] <= global_batch


def test_epochs_and_seeds_differ_in_order_which_never_changes() -> None:
    sequences = make_sequences([1] * 50)
    for kind, distinct in (("shuffle", 4), ("length", 4), ("sequential", 1)):
        orders = {tuple(epoch_of(Sampler(kind, 4, seed), sequences, epoch)) for seed in (0, 1) for epoch in (0, 1)}
        assert len(orders) == distinct, kind
    fixed = shuffled(sequences[:8], Sampler("shuffle", 1, 0), 0)
    assert fixed.tolist() == [0, 7, 2, 5, 4, 6, 3, 1]  # a run resumed years later must agree
    assert epoch_of(Sampler("sequential", 3, 7), sequences) == list(range(50))


def test_positions_in_the_order_are_spread_evenly() -> None:
    """The mean position of a sequence over 2,000 epochs is the middle: within 5 sd of a uniform position."""
    sampler = Sampler("shuffle", 1, 0)
    positions = np.stack([np.argsort(shuffled(range(20), sampler, epoch)) for epoch in range(2000)])
    assert np.abs(positions.mean(0) - 9.5).max() < 5 * np.sqrt((20**2 - 1) / 12 / 2000)


def test_by_length_a_step_has_similar_lengths_and_steps_are_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 40 * 16)
    sequences = make_sequences(lengths)
    assert len(sequences) <= WINDOW_STEPS * 16
    sampler = Sampler("length", 16, 3)
    spans, longest = [], []
    for step in range(40):
        step_lengths = lengths[sampler.indices(sequences, step)]
        spans.append(step_lengths.max() - step_lengths.min())
        longest.append(step_lengths.max())
    assert max(spans) < 200  # 2,000 over 40 steps is 50 on average
    assert abs(np.corrcoef(longest, range(40))[0, 1]) < 0.5  # not a curriculum


def test_the_order_of_one_data_set_is_not_reused_for_another() -> None:
    sampler = Sampler("length", 2, 0)
    assert epoch_of(sampler, make_sequences([5, 1, 9, 3])) != epoch_of(sampler, make_sequences([1, 9, 3, 5]))


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=64),
    sizes=st.one_of(
        st.builds(lambda micro, world: [micro] * world, st.integers(1, 9), st.integers(1, 6)),
        st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ),
)
def test_all_ranks_get_as_many_micro_batches_of_a_step(lengths: list[int], sizes: list[int]) -> None:
    indices = list(range(100, 100 + len(lengths)))
    split = split_across_ranks(indices, lengths, sizes)
    ranks = [micro_batches(part, len(indices), size, sizes) for part, size in zip(split, sizes, strict=True)]
    assert sorted(index for groups in ranks for group in groups for index in group) == indices
    assert len({len(groups) for groups in ranks}) == 1
    assert all(len(group) <= size for groups, size in zip(ranks, sizes, strict=True) for group in groups)
    assert all(any(groups) for groups in zip(*ranks, strict=True)), "no micro-batch is empty on all ranks"
    assert split == split_across_ranks(indices[::-1], lengths[::-1], sizes)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=64), world=st.integers(1, 6))
def test_ranks_differ_by_no_more_tokens_than_the_longest_sequence(lengths: list[int], world: int) -> None:
    """A sequence is never divided. No rank is idle if there are as many sequences as ranks."""
    split = split_across_ranks(range(len(lengths)), lengths, [1] * world)
    tokens = [sum(lengths[index] for index in part) for part in split]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert all(split) or len(lengths) < world
    assert max(map(len, split)) == -(-len(lengths) // world)


def test_the_split_across_ranks_is_more_even_than_round_robin() -> None:
    """64 instruction examples on 8 ranks: the fullest rank has 2 % more tokens than the mean, round robin 22 %."""
    draw = np.random.default_rng(0)
    over, round_robin = [], []
    for _ in range(50):
        lengths = np.clip(draw.lognormal(np.log(100), 0.6, 64).astype(int), 8, 2048).tolist()
        ordered = sorted(lengths, reverse=True)
        tokens = [sum(lengths[i] for i in part) for part in split_across_ranks(range(64), lengths, [4] * 8)]
        over.append(max(tokens) / np.mean(tokens))
        round_robin.append(sum(ordered[0::8]) / np.mean(tokens))
    assert np.median(over) < 1.04 < 1.18 < np.median(round_robin)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=64), micro=st.integers(1, 9))
def test_the_split_by_length_never_needs_more_padding(lengths: list[int], micro: int) -> None:
    """Micro-batches of sorted sequences have the smallest sum of maximum lengths, whatever the order before."""

    def padded_length(indices: Sequence[int]) -> int:
        groups = micro_batches(indices, len(indices), micro, [micro])
        return sum(max(lengths[index] for index in group) for group in groups)

    assert padded_length(split_across_ranks(range(len(lengths)), lengths, [1])[0]) <= padded_length(range(len(lengths)))


def test_an_order_without_effect_on_packed_sequences_is_refused() -> None:
    for kind in ("length", "sequential"):
        with pytest.raises(ValueError, match="no effect on packed sequences"):
            Data.model_validate({"train": "x.jsonl", "order": kind})
        assert Data.model_validate({"train": "x.jsonl", "order": kind, "packing": False}).order == kind
    assert lengths_of(make_sequences([3, 1])).tolist() == [3, 1]
