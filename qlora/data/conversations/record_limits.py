"""Limits on rendering one record: processor time and memory.

A chat template is a program and a record is its input: a template that passes the probe may still loop on one record.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from qlora.data.types import RecordError
from qlora.utils.machine import GIB
from qlora.utils.sandbox import LimitExceeded, Limits

RECORD_LIMITS = Limits(seconds=1.0, memory_bytes=2 * GIB)  # an honest record takes a few hundredths of a second


@contextmanager
def time_limit(seconds: float = RECORD_LIMITS.seconds) -> Iterator[None]:
    """RecordError if the block takes more processor time."""
    try:
        with replace(RECORD_LIMITS, seconds=seconds).time():
            yield
    except LimitExceeded:
        raise RecordError("takes too long to render", f"more than {seconds:g} s of processor time") from None


@contextmanager
def memory(memory_bytes: int = RECORD_LIMITS.memory_bytes) -> Iterator[None]:
    """MemoryError if the block takes more memory than this in addition to what the process holds."""
    with replace(RECORD_LIMITS, memory_bytes=memory_bytes).memory():
        yield
