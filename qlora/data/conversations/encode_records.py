"""Rows -> messages -> tokens, many rows at a time: each row with what it became, in the order of the rows."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from typing import Protocol

from qlora.data import FORMATS
from qlora.data.conversations import worker_pool
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import BadRecord, Message, Record, RecordError

CHUNK_ROWS, CHUNK_CHARS = 512, 2**20  # encoded together, at most; one row may be longer
_AUTO = ("tokens", "messages", "sharegpt", "alpaca", "completion", "text")  # the most telling columns first

RawRecord = Record | BadRecord
Made = Encoded | RecordError | None  # None for a line that could not be read


class Format(Protocol):
    """What a file of formats/ gives."""

    def matches(self, fields: Mapping[str, object]) -> bool:
        """Whether the columns are those of this format."""

    def messages(self, row: Record) -> list[Message]:
        """The messages that `row` stands for. RowError if it can't be read."""


def encoded_rows(
    rows: Iterator[RawRecord], kind: str, encoder: Encoder, crew: int = 1, chunk_rows: int = CHUNK_ROWS
) -> Iterator[tuple[RawRecord, Made]]:
    """Each row with what it became: encoded, or the reason why not.

    crew: worker processes for a set of more than a few chunks; the result does not depend on it.
    """
    encode = partial(encode_chunk, kind=kind, encoder=encoder)
    chunks = _chunks(rows, chunk_rows)
    first = list(islice(chunks, worker_pool.WORTH_CHUNKS)) if crew > 1 else []
    for chunk in first:
        yield from zip(chunk, encode(chunk), strict=True)
    if len(first) < worker_pool.WORTH_CHUNKS:
        crew = 1
    for rest, made in worker_pool.in_order(encode, chunks, crew):
        yield from zip(rest, made, strict=True)


def _chunks(rows: Iterator[RawRecord], chunk_rows: int) -> Iterator[list[RawRecord]]:
    """Rows in groups that are held at the same time: few of them where they are long."""
    held, size = list[RawRecord](), 0
    for row in rows:
        held.append(row)
        size += _size(row.fields) if isinstance(row, Record) else 0
        if len(held) == chunk_rows or size >= CHUNK_CHARS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _size(value: object) -> int:
    """Characters in the strings of `value`, and as many for each number as a token has."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 4


def encode_chunk(chunk: Sequence[RawRecord], kind: str, encoder: Encoder) -> list[Made]:
    """What each row of `chunk` becomes."""
    read = [_read(row, kind) if isinstance(row, Record) else None for row in chunk]
    items = [(row.where, m) for row, m in zip(chunk, read, strict=True) if isinstance(m, list)]
    made = iter(encoder.encode_all(items))
    return [next(made) if isinstance(m, list) else m for m in read]


def messages_of(row: Record, kind: str) -> list[Message]:
    """The messages of `row` read as format `kind`, or, for auto, as the first format that has its columns. RowError."""
    if kind != "auto":
        return _format(kind).messages(row)
    found = format_of(row)
    if found:
        return _format(found).messages(row)
    columns = ", ".join(str(name) for name in row.fields)
    raise RecordError("no known format", f"columns {columns or '(none)'}; name data.format or map data.train.columns")


def format_of(row: Record) -> str | None:
    """The first format that has the columns of `row`, the most telling ones first; None if there is none."""
    return next((name for name in _AUTO if _format(name).matches(row.fields)), None)


@cache
def _format(kind: str) -> Format:
    made: Format = FORMATS[kind]()
    return made


def _read(row: Record, kind: str) -> list[Message] | RecordError:
    try:
        return messages_of(row, kind)
    except RecordError as error:
        return error
