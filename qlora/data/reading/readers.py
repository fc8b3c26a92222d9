"""Readers of data files: JSONL, JSON, CSV, TSV and text -> records with file:line.

A hostile or broken line becomes a BadRecord. No line raises an error, and none is read without a size limit.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from qlora.data.reading import json_array, strict_json
from qlora.data.reading.strict_json import MAX_RECORD_BYTES
from qlora.data.types import BadRecord, Record, RecordError
from qlora.errors import DataError

Records = Iterator[Record | BadRecord]

_TOO_LARGE = "record too large"
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: Path, name: str) -> Records:
    """A record for each line. Blank lines are skipped."""
    require_utf8(path, name)
    for number, line in _lines(path):
        where = f"{name}:{number}"
        if line is None:
            yield BadRecord(where, _TOO_LARGE, f"at most {MAX_RECORD_BYTES} bytes")
        elif line.strip():
            try:
                yield Record(where, strict_json.parse(line))
            except RecordError as error:
                yield BadRecord(where, error.reason, error.detail)


def read_json(path: Path, name: str) -> Records:
    """A record for each object of an array (name:n counts objects from 1), or for each line of a JSONL file."""
    require_utf8(path, name)
    head = _first_bytes(path)
    if head.startswith(b"["):
        yield from _read_array(path, name)
    elif (fields := _single_object(path, head)) is not None:
        yield Record(f"{name}:1", fields)
    else:
        yield from read_jsonl(path, name)


def read_table(path: Path, name: str, delimiter: str) -> Records:
    """A record for each row of a CSV or TSV file with a header; name:n is the line where the row starts.

    A header of one column that has semicolons is separated by them: spreadsheets write so where a comma is decimal.
    """
    require_utf8(path, name)
    if delimiter == "," and len(_header(path, ",")) == 1 < len(_header(path, ";")):
        delimiter = ";"
    lines = _NumberedLines(path)
    header = next(_rows(lines, delimiter), None)
    if header is None:
        return
    columns = header[1]
    if isinstance(columns, RecordError) or len(set(columns)) != len(columns) or "" in columns:
        raise DataError(f"{name}:1: the first line must name every column once. Found {columns!r}.")
    for number, row in _rows(lines, delimiter):
        where = f"{name}:{number}"
        if isinstance(row, RecordError):
            yield BadRecord(where, row.reason, row.detail)
        elif len(row) != len(columns):
            yield BadRecord(where, "wrong number of columns", f"{len(row)} where the header has {len(columns)}")
        else:
            yield Record(where, dict(zip(columns, row, strict=True)))


def _header(path: Path, delimiter: str) -> list[str]:
    row = next(_rows(_NumberedLines(path), delimiter), (1, []))[1]
    return [] if isinstance(row, RecordError) else row


def require_utf8(path: Path, name: str) -> None:
    """DataError for a file in UTF-16 or UTF-32, by its first bytes. A line that is not UTF-8 is a BadRecord later."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{name}: found UTF-16 or UTF-32 text, allowed: UTF-8. Save the file as UTF-8.")


def read_text(path: Path, name: str) -> Records:
    """A record with the field `text` for each paragraph. Paragraphs are separated by blank lines."""
    require_utf8(path, name)
    start, size, lines, problem = 0, 0, list[str](), ""
    for number, line in _lines(path):
        if line is not None and not line.strip():
            if lines or problem:
                yield _paragraph(f"{name}:{start}", lines, problem)
            size, lines, problem = 0, [], ""
            continue
        start = start if lines or problem else number
        size += len(line or b"")
        try:
            lines.append(strict_json.decode(line or b""))
        except RecordError as error:
            problem = str(error)
        if line is None or size > MAX_RECORD_BYTES:
            problem, lines = f"{_TOO_LARGE}: at most {MAX_RECORD_BYTES} bytes; a blank line starts a new record", []
    if lines or problem:
        yield _paragraph(f"{name}:{start}", lines, problem)


def _paragraph(where: str, lines: list[str], problem: str) -> Record | BadRecord:
    if problem:
        reason, _, detail = problem.partition(": ")
        return BadRecord(where, reason, detail)
    return Record(where, {"text": "".join(lines).replace("\r\n", "\n").rstrip("\r\n")})


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number from 1; None for a line above the size limit, which is never held in memory."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                while (more := file.readline(MAX_RECORD_BYTES)) and not more.endswith(b"\n"):
                    pass
                yield number, None
            else:
                yield number, line.removeprefix(_BOM) if number == 1 else line


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip()


def _read_array(path: Path, name: str) -> Records:
    with path.open("rb") as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        for number, item in enumerate(json_array.items(file), 1):
            where = f"{name}:{number}"
            yield BadRecord(where, item.reason, item.detail) if isinstance(item, RecordError) else Record(where, item)


def _single_object(path: Path, head: bytes) -> dict[str, object] | None:
    """The object of a file that holds one object over several lines; None for any other file."""
    if not head.startswith(b"{") or path.stat().st_size > MAX_RECORD_BYTES:
        return None
    try:
        return strict_json.parse(path.read_bytes().removeprefix(_BOM))
    except RecordError:
        return None


class _NumberedLines:
    """The lines of a table as text. `number` is that of the last line, `error` why one could not be read."""

    def __init__(self, path: Path) -> None:
        self.number = 0
        self.error: RecordError | None = None
        self._lines = _lines(path)

    def __iter__(self) -> "_NumberedLines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        try:
            if line is None:
                raise RecordError(_TOO_LARGE, f"at most {MAX_RECORD_BYTES} bytes")
            return strict_json.decode(line)
        except RecordError as error:
            self.error = error
            return "\n"


def _rows(lines: _NumberedLines, delimiter: str) -> Iterator[tuple[int, list[str] | RecordError]]:
    """Each row of a table with the line where it starts. Blank lines are skipped."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, lines.error = lines.number + 1, None
        try:
            row: list[str] | RecordError = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = RecordError("not a table row", str(error))
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        if row or lines.error:
            yield start, lines.error or row
