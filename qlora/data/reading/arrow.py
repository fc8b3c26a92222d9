"""Rows of Arrow tables: Parquet files and data sets of the hub, downloaded or streamed. The door to `datasets`."""

import hashlib
import json
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets

from qlora.data.types import Record
from qlora.errors import DataError

_ROOM = 0.9  # of the free disk, that a download and the tables made from it may take


def parquet(name: str) -> Iterator[Record]:
    """The rows of a Parquet file, a few at a time. DataError if it can't be read."""
    try:
        table = datasets.load_dataset("parquet", data_files=[name], split="train", streaming=True)
        for number, fields in enumerate(table, 1):
            yield Record(f"{name}:{number}", fields)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: not a readable Parquet file: {_first_line(error)}") from error


@dataclass(frozen=True)
class Hub:
    """A split of a data set on the hub; owner/name:config picks a configuration. Remote code is never run.

    It is streamed, and nothing of it stored, if only its first rows are wanted (`limited`) or the disk has no room.
    """

    name: str
    split: str | None
    limited: bool

    def rows(self) -> Iterator[Record]:
        """The rows in their order. DataError if they can't be fetched."""
        split = self.split or "train"
        with _told(self.name):
            numbered = enumerate(self._table(split), 1)
        while True:
            with _told(self.name):
                number, fields = next(numbered, (0, {}))
            if not number:
                return
            yield Record(f"{self.name}/{split}:{number}", fields)

    def sha256(self) -> str:
        """The digest of the rows; of a streamed set, of the commit that they come from."""
        if self.streams:
            known = f"{self.name}@{self._builder.hash}/{self.split or 'train'}"
            return hashlib.sha256(known.encode()).hexdigest()
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(json.dumps(dict(row.fields), sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @cached_property
    def streams(self) -> bool:
        """Whether rows come over the network as they are read."""
        if datasets.config.HF_HUB_OFFLINE or self._builder.hash is None:
            return False
        return self.limited or not fits_disk(self._builder.info, Path(datasets.config.HF_DATASETS_CACHE))

    @cached_property
    def _builder(self) -> Any:
        _refuse_if_unreachable(self.name)
        repository, _, config = self.name.partition(":")
        with _told(self.name):
            return datasets.load_dataset_builder(repository, config or None)

    def _table(self, split: str) -> Iterable[Mapping[str, Any]]:
        builder = self._builder
        if self.streams:
            return builder.as_streaming_dataset(split)  # type: ignore[no-any-return]
        builder.download_and_prepare()
        return builder.as_dataset(split)  # type: ignore[no-any-return]


def fits_disk(info: Any, folder: Path) -> bool:
    """Whether what a data set says of its size has room where `datasets` would keep it; unknown sizes do."""
    needed = int(info.download_size or 0) + int(info.dataset_size or 0)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return needed <= _ROOM * shutil.disk_usage(place).free


class _told:
    """Whatever the hub's client raises inside, the user needs the name and the reason."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise DataError(
                f"{self._name}: no such file or folder here, and not readable as a hub data set: {_first_line(error)}"
            ) from error


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
