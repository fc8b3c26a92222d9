"""Sources -> rows with file:line, renamed, limited and weighted."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora.data.reading import arrow, readers
from qlora.data.reading.resolve_paths import Located, locate
from qlora.data.types import BadRecord, Record

if TYPE_CHECKING:
    from qlora.data import Source


def rows(sources: "Sequence[Source]", seed: int) -> Iterator[Record | BadRecord]:
    """The rows of all sources in turn, thinned or repeated by their weights. DataError for a missing file."""
    for index, source in enumerate(sources):
        yield from read(source, locate(source), (seed, index))


def read(source: "Source", located: Located, seed: tuple[int, int]) -> Iterator[Record | BadRecord]:
    """The rows of one source: columns renamed, at most `max_samples` of them, each kept `weight` times on average.

    A weight of 2.5 gives every row two copies and half of the rows a third; which ones is a function of `seed`.
    """
    draws = np.random.default_rng(seed)
    whole, part = math.floor(source.weight), source.weight % 1
    for row in islice(_raw(source, located), source.max_samples):
        share = whole + int(part > 0 and draws.random() < part)
        if isinstance(row, BadRecord):
            yield row
        elif share:
            yield _renamed(row, source, share)


def sha256(source: "Source", located: Located) -> str:
    """The digest of what `source` holds: of its files' bytes in reading order, or of a hub set's rows."""
    digest = hashlib.sha256()
    for name in located.files:
        with Path(name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if located.hub:
        digest.update(hub_of(source, located.hub).sha256().encode())
    return digest.hexdigest()


def hub_of(source: "Source", name: str) -> arrow.Hub:
    """The data set of the hub that `source` means by `name`."""
    return arrow.Hub(name, source.split, limited=source.max_samples is not None)


def _raw(source: "Source", located: Located) -> Iterator[Record | BadRecord]:
    for name in located.files:
        yield from _read_file(name)
    if located.hub:
        yield from hub_of(source, located.hub).rows()


def _read_file(name: str) -> Iterator[Record | BadRecord]:
    path, kind = Path(name), Path(name).suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return readers.read_jsonl(path, name)
    if kind == ".json":
        return readers.read_json(path, name)
    if kind in (".csv", ".tsv"):
        return readers.read_table(path, name, "," if kind == ".csv" else "\t")
    if kind == ".parquet":
        return arrow.parquet(name)
    return readers.read_text(path, name)


def _renamed(row: Record, source: "Source", copies: int) -> Record | BadRecord:
    """`row` under our column names; source.columns says {ours: theirs}."""
    fields = dict(row.fields)
    for ours, theirs in (source.columns or {}).items():
        if theirs not in row.fields:
            return BadRecord(row.where, "missing column", f"no {theirs!r}; the row has {', '.join(row.fields)}")
        if ours != theirs:
            fields.pop(theirs, None)
        fields[ours] = row.fields[theirs]
    return Record(row.where, fields, copies)
