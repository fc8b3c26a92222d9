"""Prefetching gives the results of reading one by one, in order, within its memory budget."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qlora.model.prefetch import PerThread, prefetch


@settings(max_examples=30, deadline=None)
@given(sizes=some.lists(some.integers(1, 50), max_size=30), budget=some.integers(1, 120))
def test_items_come_in_order_and_within_the_budget(sizes: list[int], budget: int) -> None:
    lock, held, peak = threading.Lock(), [0], [0]
    items = list(enumerate(sizes))

    def read(item: tuple[int, int]) -> int:
        with lock:
            held[0] += item[1]
            peak[0] = max(peak[0], held[0])
        return item[1] * 2

    seen = []
    for item, result in prefetch(items, lambda item: item[1], read, budget):
        seen.append((item, result))
        with lock:
            held[0] -= item[1]
    assert seen == [(item, item[1] * 2) for item in items]
    assert peak[0] <= max([budget, *sizes])


def test_an_error_is_raised_at_the_position_of_its_item() -> None:
    def read(item: int) -> int:
        if item == 3:
            raise ValueError("the third")
        return item

    seen = []
    with pytest.raises(ValueError, match="the third"):
        for item, _ in prefetch(range(10), lambda item: 1, read, 100):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_items_are_read_while_the_previous_one_is_used() -> None:
    thread_ids, own_id = list[int](), PerThread(threading.get_ident)

    def read(item: int) -> int:
        thread_ids.append(own_id.value)
        return item

    for item, _ in prefetch(range(4), lambda item: 1, read, 2):
        time.sleep(0.05)
        assert len(thread_ids) >= min(4, item + 2)
    assert threading.get_ident() not in thread_ids
