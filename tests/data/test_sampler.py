"""The order of rows is a pure function that visits each row once, whatever the processes, and deals tokens evenly."""

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
    shares,
    shuffled,
    steps_per_epoch,
)
from qlora.data.types import Example

seeds = st.integers(0, 2**64 - 1)
EACH_ORDER = pytest.mark.parametrize("kind", ORDERS)


def rows_of(lengths) -> list[Example]:
    return [Example(str(i), np.ones(length, np.int32), np.ones(length, np.int32)) for i, length in enumerate(lengths)]


def epoch_of(order: Sampler, rows, epoch: int = 0) -> list[int]:
    steps = steps_per_epoch(len(rows), order.global_batch)
    return [row for step in range(epoch * steps, (epoch + 1) * steps) for row in order.rows(rows, step)]


@EACH_ORDER
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=300),
    global_batch=st.integers(1, 17),
    seed=seeds,
    epoch=st.integers(0, 9),
)
def test_an_epoch_visits_every_row_once_in_full_steps_and_a_last_short_one(kind, lengths, global_batch, seed, epoch):
    rows, order = rows_of(lengths), Sampler(kind, global_batch, seed)
    seen = epoch_of(order, rows, epoch)
    assert sorted(seen) == list(range(len(rows)))
    assert seen == epoch_of(Sampler(kind, global_batch, seed), rows_of(lengths), epoch)
    steps = steps_per_epoch(len(rows), global_batch)
    sizes = [len(order.rows(rows, epoch * steps + step)) for step in range(steps)]
    assert all(size == global_batch for size in sizes[:-1]) and 0 < sizes[-1] <= global_batch


def test_epochs_and_seeds_have_their_own_order_and_it_never_changes():
    rows = rows_of([1] * 50)
    for kind, distinct in (("shuffle", 4), ("length", 4), ("sequential", 1)):
        orders = {tuple(epoch_of(Sampler(kind, 4, seed), rows, epoch)) for seed in (0, 1) for epoch in (0, 1)}
        assert len(orders) == distinct, kind
    fixed = shuffled(rows[:8], Sampler("shuffle", 1, 0), 0)
    assert fixed.tolist() == [0, 7, 2, 5, 4, 6, 3, 1]  # a resume years later must agree
    assert epoch_of(Sampler("sequential", 3, 7), rows) == list(range(50))


def test_places_in_the_order_are_spread_evenly():
    """The mean place of a row over 2,000 epochs is the middle: within 5 sd of a uniform place."""
    order = Sampler("shuffle", 1, 0)
    places = np.stack([np.argsort(shuffled(range(20), order, epoch)) for epoch in range(2000)])
    assert np.abs(places.mean(0) - 9.5).max() < 5 * np.sqrt((20**2 - 1) / 12 / 2000)


def test_by_length_a_step_has_rows_of_like_length_and_steps_come_in_any_order():
    lengths = np.random.default_rng(0).integers(1, 2000, 40 * 16)
    rows = rows_of(lengths)
    assert len(rows) <= WINDOW_STEPS * 16
    order = Sampler("length", 16, 3)
    spans, longest = [], []
    for step in range(40):
        found = lengths[order.rows(rows, step)]
        spans.append(found.max() - found.min())
        longest.append(found.max())
    assert max(spans) < 200  # 2,000 over 40 steps is 50 on average
    assert abs(np.corrcoef(longest, range(40))[0, 1]) < 0.5  # not a curriculum


def test_other_rows_are_never_taken_for_the_ones_before():
    order = Sampler("length", 2, 0)
    assert epoch_of(order, rows_of([5, 1, 9, 3])) != epoch_of(order, rows_of([1, 9, 3, 5]))


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=64),
    sizes=st.one_of(
        st.builds(lambda micro, world: [micro] * world, st.integers(1, 9), st.integers(1, 6)),
        st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ),
)
def test_a_step_is_dealt_whole_in_as_many_micro_batches_everywhere(lengths, sizes):
    rows = list(range(100, 100 + len(lengths)))
    dealt = shares(rows, lengths, sizes)
    groups = [micro_batches(share, len(rows), own, sizes) for share, own in zip(dealt, sizes, strict=True)]
    assert sorted(row for mine in groups for group in mine for row in group) == rows
    assert len({len(mine) for mine in groups}) == 1
    assert all(len(group) <= own for mine, own in zip(groups, sizes, strict=True) for group in mine)
    assert all(any(group for group in at) for at in zip(*groups, strict=True)), "no micro-batch is idle everywhere"
    assert dealt == shares(rows[::-1], lengths[::-1], sizes)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=64), world=st.integers(1, 6))
def test_processes_get_as_many_tokens_as_the_rows_allow(lengths, world):
    """No two processes are further apart than the longest row is long, for a row is never cut; and nobody idles."""
    dealt = shares(range(len(lengths)), lengths, [1] * world)
    tokens = [sum(lengths[row] for row in share) for share in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert all(dealt) or len(lengths) < world
    assert max(map(len, dealt)) == -(-len(lengths) // world)


def test_dealing_evens_out_what_dealing_in_turn_does_not():
    """64 rows of an instruction set on 8 processes: the fullest has 2 % more than the mean, dealt in turn 22 %."""
    draw = np.random.default_rng(0)
    over, in_turn = [], []
    for _ in range(50):
        lengths = np.clip(draw.lognormal(np.log(100), 0.6, 64).astype(int), 8, 2048).tolist()
        ordered = sorted(lengths, reverse=True)
        tokens = [sum(lengths[row] for row in share) for share in shares(range(64), lengths, [4] * 8)]
        over.append(max(tokens) / np.mean(tokens))
        in_turn.append(sum(ordered[0::8]) / np.mean(tokens))
    assert np.median(over) < 1.04 < 1.18 < np.median(in_turn)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=64), micro=st.integers(1, 9))
def test_sharing_by_length_never_costs_cells(lengths, micro):
    """Groups of sorted rows have the least sum of their longest rows, whatever the order before."""

    def longest(rows):
        return sum(max(lengths[row] for row in group) for group in micro_batches(rows, len(rows), micro, [micro]))

    assert longest(shares(range(len(lengths)), lengths, [1])[0]) <= longest(range(len(lengths)))


def test_an_order_that_packing_would_undo_is_refused():
    for kind in ("length", "sequential"):
        with pytest.raises(ValueError, match="no effect while rows are packed"):
            Data.model_validate({"train": "x.jsonl", "order": kind})
        assert Data.model_validate({"train": "x.jsonl", "order": kind, "packing": False}).order == kind
    assert lengths_of(rows_of([3, 1])).tolist() == [3, 1]
