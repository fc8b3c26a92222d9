"""Sources -> rows with file:line, renamed, limited and weighted. The door to `datasets`."""

import hashlib
import json
import math
import socket
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import numpy as np

from qlora.data import files
from qlora.data.places import Located, locate
from qlora.data.types import BadRow, Row
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.data import Source


def rows(sources: "Sequence[Source]", seed: int) -> Iterator[Row | BadRow]:
    """The rows of all sources in turn, thinned or repeated by their weights. DataError for a missing file."""
    for index, source in enumerate(sources):
        yield from read(source, locate(source), (seed, index))


def read(source: "Source", located: Located, seed: tuple[int, int]) -> Iterator[Row | BadRow]:
    """The rows of one source: columns renamed, at most `max_samples` of them, each kept `weight` times on average.

    A weight of 2.5 gives every row two copies and half of the rows a third; which ones is a function of `seed`.
    """
    draws = np.random.default_rng(seed)
    whole, part = math.floor(source.weight), source.weight % 1
    for row in islice(_raw(source, located), source.max_samples):
        share = whole + int(part > 0 and draws.random() < part)
        if isinstance(row, BadRow):
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
        for row in _hub(located.hub, source.split):
            digest.update(json.dumps(dict(row.fields), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _raw(source: "Source", located: Located) -> Iterator[Row | BadRow]:
    for name in located.files:
        yield from _read_file(name)
    if located.hub:
        yield from _hub(located.hub, source.split)


def _read_file(name: str) -> Iterator[Row | BadRow]:
    path, kind = Path(name), Path(name).suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return files.read_jsonl(path, name)
    if kind == ".json":
        return files.read_json(path, name)
    if kind in (".csv", ".tsv"):
        return files.read_table(path, name, "," if kind == ".csv" else "\t")
    if kind == ".parquet":
        return _parquet(name)
    return files.read_text(path, name)


def _renamed(row: Row, source: "Source", copies: int) -> Row | BadRow:
    """`row` under our column names; source.columns says {ours: theirs}."""
    fields = dict(row.fields)
    for ours, theirs in (source.columns or {}).items():
        if theirs not in row.fields:
            return BadRow(row.where, "missing column", f"no {theirs!r}; the row has {', '.join(row.fields)}")
        if ours != theirs:
            fields.pop(theirs, None)
        fields[ours] = row.fields[theirs]
    return Row(row.where, fields, copies)


def _parquet(name: str) -> Iterator[Row]:
    try:
        table = datasets.load_dataset("parquet", data_files=[name], split="train", streaming=True)
        for number, fields in enumerate(table, 1):
            yield Row(f"{name}:{number}", fields)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: not a readable Parquet file: {_first_line(error)}") from error


def _hub(name: str, split: str | None) -> Iterator[Row]:
    """Rows of a hub data set; owner/name:config picks a configuration. Remote code is never run."""
    repository, _, config = name.partition(":")
    _refuse_if_unreachable(name)
    try:
        table = datasets.load_dataset(repository, config or None, split=split or "train")
    except Exception as error:  # whatever the hub client raises, the user needs the name and the reason
        raise DataError(
            f"{name}: no such file or folder here, and not readable as a hub data set: {_first_line(error)}"
        ) from error
    for number, fields in enumerate(table, 1):
        yield Row(f"{name}/{split or 'train'}:{number}", fields)


def _refuse_if_unreachable(name: str) -> None:
    """DataError at once where the hub's name can't be resolved: its client would try again for half a minute."""
    if datasets.config.HF_HUB_OFFLINE or getproxies():
        return
    host = urlsplit(datasets.config.HF_ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise DataError(
            f"{name}: no such file or folder here, and the hub ({host}) can't be reached for a data set of that name. "
            "With HF_HUB_OFFLINE=1 what was downloaded before is used."
        ) from None


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
