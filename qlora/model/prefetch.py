"""Prefetching: other threads read and hash the next tensors while the current one is quantized.

At most PREFETCH_BYTES of read tensors wait, or one item. Order and errors are those of reading one by one.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

PREFETCH_BYTES = 256 * 2**20
READERS = min(4, os.cpu_count() or 1)
Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    items: Sequence[Item],
    size: Callable[[Item], int],
    read: Callable[[Item], Result],
    budget_bytes: int = PREFETCH_BYTES,
) -> Iterator[tuple[Item, Result]]:
    """Items with their `read(item)`, in order; `size(item)` is in bytes. Several threads call `read` at once."""
    queue: deque[tuple[Item, int, Future[Result]]] = deque()
    remaining, queued_bytes = iter(items), 0
    upcoming = next(remaining, None)
    with ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="reader") as readers:
        try:
            while upcoming is not None or queue:
                while upcoming is not None and (not queue or queued_bytes + size(upcoming) <= budget_bytes):
                    queue.append((upcoming, size(upcoming), readers.submit(read, upcoming)))
                    queued_bytes += queue[-1][1]
                    upcoming = next(remaining, None)
                item, item_bytes, future = queue.popleft()
                yield item, future.result()
                queued_bytes -= item_bytes
        finally:
            for _, _, future in queue:
                future.cancel()


class PerThread(threading.local):
    """A value that each thread creates on first use."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.value = make()
