"""Reading ahead: tensors are read and hashed by other threads while the one at hand is quantised.

Bounded: what has been read and waits is at most AHEAD_BYTES, or one item. Order and errors are those of reading one by
one.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

AHEAD_BYTES = 256 * 2**20
READERS = min(4, os.cpu_count() or 1)
Item = TypeVar("Item")
Found = TypeVar("Found")


def ahead(
    items: Sequence[Item], size: Callable[[Item], int], read: Callable[[Item], Found], budget_bytes: int = AHEAD_BYTES
) -> Iterator[tuple[Item, Found]]:
    """Each item with what `read` gives for it, in order; `size` is its bytes. Several threads call `read` at once."""
    waiting: deque[tuple[Item, int, Future[Found]]] = deque()
    coming, held = iter(items), 0
    following = next(coming, None)
    with ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="reader") as readers:
        try:
            while following is not None or waiting:
                while following is not None and (not waiting or held + size(following) <= budget_bytes):
                    waiting.append((following, size(following), readers.submit(read, following)))
                    held += waiting[-1][1]
                    following = next(coming, None)
                item, taken, future = waiting.popleft()
                yield item, future.result()
                held -= taken
        finally:
            for _, _, future in waiting:
                future.cancel()


class PerThread(threading.local):
    """Something that each thread makes for itself when it first asks."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.own = make()
