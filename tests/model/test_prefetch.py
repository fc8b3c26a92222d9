"""Reading ahead gives what reading one by one gives, in order, and never more than its budget waits."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qlora.model.prefetch import PerThread, ahead


@settings(max_examples=30, deadline=None)
@given(sizes=some.lists(some.integers(1, 50), max_size=30), budget=some.integers(1, 120))
def test_items_come_in_order_and_within_the_budget(sizes: list[int], budget: int) -> None:
    lock, held, most = threading.Lock(), [0], [0]
    items = list(enumerate(sizes))

    def read(item: tuple[int, int]) -> int:
        with lock:
            held[0] += item[1]
            most[0] = max(most[0], held[0])
        return item[1] * 2

    seen = []
    for item, found in ahead(items, lambda item: item[1], read, budget):
        seen.append((item, found))
        with lock:
            held[0] -= item[1]
    assert seen == [(item, item[1] * 2) for item in items]
    assert most[0] <= max([budget, *sizes])


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def read(item: int) -> int:
        if item == 3:
            raise ValueError("the third")
        return item

    seen = []
    with pytest.raises(ValueError, match="the third"):
        for item, _ in ahead(range(10), lambda item: 1, read, 100):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_items_are_read_while_the_last_one_is_used() -> None:
    read_by, mine = list[int](), PerThread(threading.get_ident)

    def read(item: int) -> int:
        read_by.append(mine.own)
        return item

    for item, _ in ahead(range(4), lambda item: 1, read, 2):
        time.sleep(0.05)
        assert len(read_by) >= min(4, item + 2)
    assert threading.get_ident() not in read_by
