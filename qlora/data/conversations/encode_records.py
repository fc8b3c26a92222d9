"""Records encoded in chunks: each record with its encoding or the reason why it has none, in order."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Protocol

from qlora.data import FORMATS, SIDED_FORMATS
from qlora.data.conversations import worker_pool
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_sides import join_sides
from qlora.data.conversations.encoder import Encoder
from qlora.data.reading import loss_keys
from qlora.data.reading.tracked_fields import TrackedFields
from qlora.data.types import BadRecord, Message, Record, RecordError

CHUNK_RECORDS, CHUNK_CHARS = 512, 2**20  # encoded together, at most; a single record may be longer
_DETECTION_ORDER = (
    "tokens",
    "messages",
    "sharegpt",
    "alpaca",
    "completion",
    "text",
    "preference",
)  # most specific first

RawRecord = Record | BadRecord
EncodeResult = Encoded | RecordError | None  # None for a BadRecord


@dataclass(frozen=True, slots=True)
class _Parsed:
    """The conversations of a record, and the keys that its format did not read."""

    conversations: list[list[Message]]
    unread: tuple[str, ...]
    roles: tuple[int, ...] = ()  # of the conversations, where they are sides


class Format(Protocol):
    """The interface of a file in formats/."""

    def matches(self, fields: Mapping[str, object]) -> bool:
        """Whether the columns are those of this format."""

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`. RecordError if it can't be read."""


def encode_records(
    records: Iterator[RawRecord], kind: str, encoder: Encoder, workers: int = 1, chunk_records: int | None = None
) -> Iterator[tuple[RawRecord, EncodeResult]]:
    """Each record with its encoding, or the reason why it has none.

    workers: processes, for a data set of more than a few chunks. The result does not depend on their number.
    chunk_records: encoded together, at most; None: CHUNK_RECORDS.
    """
    encode = partial(encode_chunk, kind=kind, encoder=encoder)
    chunks = _chunks(records, chunk_records or CHUNK_RECORDS)
    first_chunks = list(islice(chunks, worker_pool.MIN_CHUNKS)) if workers > 1 else []
    for first_chunk in first_chunks:
        yield from zip(first_chunk, encode(first_chunk), strict=True)
    if len(first_chunks) < worker_pool.MIN_CHUNKS:
        workers = 1
    for chunk, results in worker_pool.map_in_order(encode, chunks, workers):
        yield from zip(chunk, results, strict=True)


def _chunks(records: Iterator[RawRecord], chunk_records: int) -> Iterator[list[RawRecord]]:
    """Records in groups that are in memory together: fewer where records are long."""
    chunk, size = list[RawRecord](), 0
    for record in records:
        chunk.append(record)
        size += _size(record.fields) if isinstance(record, Record) else 0
        if len(chunk) == chunk_records or size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(value: object) -> int:
    """Characters of all strings in `value`; a number counts as the characters of a token."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 4


def encode_chunk(chunk: Sequence[RawRecord], kind: str, encoder: Encoder) -> list[EncodeResult]:
    """The encoding of each record of `chunk`, or the reason why it has none."""
    with _garbage_collection_paused():
        return _encode_chunk(chunk, kind, encoder)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """A chunk has few cyclic objects, and looking for them among all others takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _encode_chunk(chunk: Sequence[RawRecord], kind: str, encoder: Encoder) -> list[EncodeResult]:
    parsed = [_parse(record, kind) if isinstance(record, Record) else None for record in chunk]
    records = [(record.where, p) for record, p in zip(chunk, parsed, strict=True) if isinstance(p, _Parsed)]
    encoded = iter(encoder.encode_batch([(where, item) for where, p in records for item in p.conversations]))
    results = iter([_joined(p, list(islice(encoded, len(p.conversations)))) for _, p in records])
    return [next(results) if isinstance(p, _Parsed) else p for p in parsed]


def _joined(parsed: _Parsed, encoded: Sequence[Encoded | RecordError]) -> Encoded | RecordError:
    return _with_unread(join_sides(encoded, parsed.roles) if parsed.roles else encoded[0], parsed.unread)


def read_messages(record: Record, kind: str) -> list[Message]:
    """The messages of `record`, read as format `kind`. For auto: the first format with its columns. RecordError."""
    return loss_keys.with_record_flags(record.fields, _format(_kind_of(record, kind)).messages(record))


def read_conversations(record: Record, kind: str) -> list[list[Message]]:
    """The conversations of `record`: one, or the sides of a pair. RecordError if it can't be read."""
    parsed = _parse(record, kind)
    if isinstance(parsed, RecordError):
        raise parsed
    return parsed.conversations


def _kind_of(record: Record, kind: str) -> str:
    """The format of a record. RecordError if it is auto and no format has the record's columns."""
    detected = detect_format(record) if kind == "auto" else kind
    if detected is None:
        columns = ", ".join(str(name) for name in record.fields)
        problem = f"columns {columns or '(none)'}"
        raise RecordError("no known format", problem)
    return detected


def detect_format(record: Record) -> str | None:
    """The first format with the columns of `record`, most specific columns first; None if there is none."""
    return next((name for name in _DETECTION_ORDER if _format(name).matches(record.fields)), None)


@cache
def _format(kind: str) -> Format:
    instance: Format = FORMATS[kind]()
    return instance


def _parse(record: Record, kind: str) -> _Parsed | RecordError:
    try:
        resolved = _kind_of(record, kind)
        fields = TrackedFields(record.fields)
        if resolved not in SIDED_FORMATS:
            messages = read_messages(Record(record.where, fields), resolved)
            return _Parsed([messages], fields.unread())
        if kind == "auto":
            raise RecordError("answers compared", f"the columns are those of data.format: {resolved}")
        sides = _format(resolved).sides(Record(record.where, fields))  # type: ignore[attr-defined]
        conversations = [loss_keys.with_record_flags(fields, messages) for _, messages in sides]
        return _Parsed(conversations, fields.unread(), tuple(role for role, _ in sides))
    except RecordError as error:
        return error


def _with_unread(result: Encoded | RecordError, unread: tuple[str, ...]) -> Encoded | RecordError:
    if isinstance(result, RecordError) or not unread:
        return result
    return replace(result, unused=replace(result.unused, fields=unread))
