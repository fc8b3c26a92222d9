"""Data sources as records with file:line: columns renamed, max_samples and weight applied."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora.data.reading import arrow, readers
from qlora.data.reading.resolve_paths import ResolvedSource, resolve_source
from qlora.data.types import BadRecord, Record

if TYPE_CHECKING:
    from qlora.data import Source

_BLOCK_BYTES = 2**22  # of a file, read at a time


def read_sources(sources: "Sequence[Source]", seed: int) -> Iterator[Record | BadRecord]:
    """The records of all sources, one source after the other. DataError for a missing file."""
    for index, source in enumerate(sources):
        yield from read_records(source, resolve_source(source), (seed, index))


def read_records(source: "Source", resolved: ResolvedSource, seed: tuple[int, int]) -> Iterator[Record | BadRecord]:
    """The records of one source: columns renamed, at most `max_samples`, each with its number of copies.

    A weight of 2.5 gives every record two copies and half of the records a third. Which half is a function of `seed`.
    """
    draws = np.random.default_rng(seed)
    copies, fraction = int(source.weight), source.weight % 1
    for record in islice(_read_resolved(source, resolved), source.max_samples):
        record_copies = copies + int(fraction > 0 and draws.random() < fraction)
        if isinstance(record, BadRecord):
            yield record
        elif record_copies:
            yield _rename_columns(record, source, record_copies)


def sha256(source: "Source", resolved: ResolvedSource) -> str:
    """A digest of the source's content: of the bytes of its files in reading order, or of a hub data set's records."""
    digest = hashlib.sha256()
    for name in resolved.files:
        with Path(name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if resolved.hub:
        digest.update(hub_dataset(source, resolved.hub).sha256().encode())
    return digest.hexdigest()


def count_records(source: "Source", resolved: ResolvedSource) -> int | None:
    """The number of records to be read, from the lines of JSONL files, for a progress bar; None for other files."""
    if resolved.hub or not all(Path(name).suffix.lower() in (".jsonl", ".ndjson") for name in resolved.files):
        return None
    lines = 0
    for name in resolved.files:
        ending = b"\n"
        with Path(name).open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                lines += block.count(b"\n")
                ending = block[-1:]
        lines += ending != b"\n"
    return lines if source.max_samples is None else min(lines, source.max_samples)


def hub_dataset(source: "Source", name: str) -> arrow.HubDataset:
    """The hub data set `name` with the split of `source`."""
    return arrow.HubDataset(name, source.split, limited=source.max_samples is not None)


def _read_resolved(source: "Source", resolved: ResolvedSource) -> Iterator[Record | BadRecord]:
    for name in resolved.files:
        yield from _read_file(name)
    if resolved.hub:
        yield from hub_dataset(source, resolved.hub).records()


def _read_file(name: str) -> Iterator[Record | BadRecord]:
    path, suffix = Path(name), Path(name).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return readers.read_jsonl(path, name)
    if suffix == ".json":
        return readers.read_json(path, name)
    if suffix in (".csv", ".tsv"):
        return readers.read_table(path, name, "," if suffix == ".csv" else "\t")
    if suffix == ".parquet":
        return arrow.read_parquet(name)
    return readers.read_text(path, name)


def _rename_columns(record: Record, source: "Source", copies: int) -> Record | BadRecord:
    """`record` with the columns renamed. source.columns: {new name: name in the file}."""
    if not source.columns and copies == record.copies:
        return record
    fields = dict(record.fields)
    for new, old in (source.columns or {}).items():
        if old not in record.fields:
            return BadRecord(record.where, "missing column", f"no {old!r}; the record has {', '.join(record.fields)}")
        if new != old:
            fields.pop(old, None)
        fields[new] = record.fields[old]
    return Record(record.where, fields, copies)
