"""Data files -> rows with file:line. Hostile lines become BadRow; nothing raises for a row or reads without bound."""

import csv
from collections.abc import Iterator
from pathlib import Path

from qlora.data.reading import json_array, strict_json
from qlora.data.reading.strict_json import MAX_ROW_BYTES
from qlora.data.types import BadRecord, Record, RecordError
from qlora.errors import DataError

Read = Iterator[Record | BadRecord]

_TOO_LARGE = "row too large"
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: Path, name: str) -> Read:
    """A row for each line that is an object; blank lines are no rows."""
    for number, line in _lines(path):
        where = f"{name}:{number}"
        if line is None:
            yield BadRecord(where, _TOO_LARGE, f"at most {MAX_ROW_BYTES} bytes")
        elif line.strip():
            try:
                yield Record(where, strict_json.parse(line))
            except RecordError as error:
                yield BadRecord(where, error.reason, error.detail)


def read_json(path: Path, name: str) -> Read:
    """A row for each object of an array (name:n counts from 1), or for each line of an object per line."""
    head = _first_bytes(path)
    if head.startswith(b"["):
        yield from _read_array(path, name)
    elif (whole := _one_object(path, head)) is not None:
        yield Record(f"{name}:1", whole)
    else:
        yield from read_jsonl(path, name)


def read_table(path: Path, name: str, delimiter: str) -> Read:
    """A row for each record of a CSV or TSV file whose first record names the columns; name:n is the record's line."""
    lines = _Numbered(path)
    columns = next(_records(lines, delimiter), None)
    if columns is None:
        return
    if isinstance(columns[1], RecordError) or len(set(columns[1])) != len(columns[1]) or "" in columns[1]:
        raise DataError(f"{name}:1: the first line must name every column once. Found {columns[1]!r}.")
    header = columns[1]
    for number, record in _records(lines, delimiter):
        where = f"{name}:{number}"
        if isinstance(record, RecordError):
            yield BadRecord(where, record.reason, record.detail)
        elif len(record) != len(header):
            yield BadRecord(where, "wrong number of columns", f"{len(record)} where the header has {len(header)}")
        else:
            yield Record(where, dict(zip(header, record, strict=True)))


def read_text(path: Path, name: str) -> Read:
    """A row with the field `text` for each paragraph, that is, for each run of lines that are not blank."""
    start, size, held, bad = 0, 0, list[str](), ""
    for number, line in _lines(path):
        if line is not None and not line.strip():
            if held or bad:
                yield _paragraph(f"{name}:{start}", held, bad)
            size, held, bad = 0, [], ""
            continue
        start = start if held or bad else number
        size += len(line or b"")
        try:
            held.append(strict_json.decode(line or b""))
        except RecordError as error:
            bad = str(error)
        if line is None or size > MAX_ROW_BYTES:
            bad, held = f"{_TOO_LARGE}: at most {MAX_ROW_BYTES} bytes", []
    if held or bad:
        yield _paragraph(f"{name}:{start}", held, bad)


def _paragraph(where: str, held: list[str], bad: str) -> Record | BadRecord:
    if bad:
        reason, _, detail = bad.partition(": ")
        return BadRecord(where, reason, detail)
    return Record(where, {"text": "".join(held).replace("\r\n", "\n").rstrip("\r\n")})


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number from 1; None for a line above the ceiling, which is skipped without being held."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (more := file.readline(MAX_ROW_BYTES)) and not more.endswith(b"\n"):
                    pass
                yield number, None
            else:
                yield number, line.removeprefix(_BOM) if number == 1 else line


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip()


def _read_array(path: Path, name: str) -> Read:
    with path.open("rb") as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        for number, item in enumerate(json_array.items(file), 1):
            where = f"{name}:{number}"
            yield BadRecord(where, item.reason, item.detail) if isinstance(item, RecordError) else Record(where, item)


def _one_object(path: Path, head: bytes) -> dict[str, object] | None:
    """The object of a file that holds just one, spread over lines; None if the file is read line by line."""
    if not head.startswith(b"{") or path.stat().st_size > MAX_ROW_BYTES:
        return None
    try:
        return strict_json.parse(path.read_bytes().removeprefix(_BOM))
    except RecordError:
        return None


class _Numbered:
    """The lines of a table as text, remembering the number of the last one given and why one could not be read."""

    def __init__(self, path: Path) -> None:
        self.number = 0
        self.fault: RecordError | None = None
        self._lines = _lines(path)

    def __iter__(self) -> "_Numbered":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        try:
            if line is None:
                raise RecordError(_TOO_LARGE, f"at most {MAX_ROW_BYTES} bytes")
            return strict_json.decode(line)
        except RecordError as error:
            self.fault = error
            return "\n"


def _records(lines: _Numbered, delimiter: str) -> Iterator[tuple[int, list[str] | RecordError]]:
    """Each record with the line it begins on; blank lines are no records."""
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, lines.fault = lines.number + 1, None
        try:
            record: list[str] | RecordError = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            record = RecordError("not a table row", str(error))
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        if record or lines.fault:
            yield start, lines.fault or record
