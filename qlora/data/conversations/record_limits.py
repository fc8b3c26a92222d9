"""Limits on rendering one record: processor time and memory.

A chat template is a program and a record is its input: a template that passes the probe may still loop on one record.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from qlora.data.types import RecordError
from qlora.utils.machine import GIB
from qlora.utils.sandbox import LimitExceeded, Limits

Item = TypeVar("Item", bound=Sequence[object])
Result = TypeVar("Result")

RECORD_LIMITS = Limits(seconds=1.0, memory_bytes=2 * GIB)  # an honest record takes a few hundredths of a second
SHARED_MESSAGES = 64  # of records that share a time limit


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


def within_time(
    records: Sequence[Item], function: Callable[[Item], Result], seconds: float = RECORD_LIMITS.seconds
) -> list[Result | RecordError]:
    """What `function` returns for each record; a RecordError for one that takes more processor time.

    A limit for each record would cost short ones a tenth of their time. So a few share one; together above it, they run
    again, one by one.
    """
    results = list[Result | RecordError]()
    for group in _groups(records):
        try:
            with time_limit(seconds):
                results += [function(record) for record in group]
        except RecordError as error:
            results += [error] if len(group) == 1 else [_alone(record, function, seconds) for record in group]
    return results


def _alone(record: Item, function: Callable[[Item], Result], seconds: float) -> Result | RecordError:
    try:
        with time_limit(seconds):
            return function(record)
    except RecordError as error:
        return error


def _groups(records: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Records in a row of up to SHARED_MESSAGES messages together; a longer one is alone."""
    start = messages = 0
    for index, record in enumerate(records):
        if index > start and messages + len(record) > SHARED_MESSAGES:
            yield records[start:index]
            start, messages = index, 0
        messages += len(record)
    if start < len(records):
        yield records[start:]
