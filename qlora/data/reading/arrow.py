"""Arrow tables as records: Parquet files and hub data sets. The only module that imports `datasets`."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from qlora.data.reading.arrow_nulls import without_filled_nulls
from qlora.data.reading.hub_access import require_reachable_hub
from qlora.data.types import Record
from qlora.errors import DataError, first_line

_DISK_FRACTION = 0.9  # of the free disk space, for a download and the tables made from it


def read_parquet(name: str) -> Iterator[Record]:
    """The records of a Parquet file, read a few at a time. DataError if it can't be read."""
    try:
        table = datasets.load_dataset("parquet", data_files=[name], split="train", streaming=True)
        for number, fields in enumerate(table, 1):
            yield Record(f"{name}:{number}", without_filled_nulls(fields, table.features))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: not a readable Parquet file: {first_line(error)}. Write or download it again."
        ) from error


@dataclass(frozen=True)
class HubDataset:
    """A split of a hub data set; the name owner/name:config selects a configuration. Remote code is never run.

    It is streamed without being stored if only its first records are needed (`limited`) or the disk is too small.
    """

    name: str
    split: str | None
    limited: bool

    def records(self) -> Iterator[Record]:
        """The records in order. DataError if they can't be fetched."""
        split = self.split or "train"
        with _hub_errors(self.name):
            table = self._table(split)
            numbered = enumerate(table, 1)
        while True:
            with _hub_errors(self.name):
                number, fields = next(numbered, (0, {}))
            if not number:
                return
            yield Record(f"{self.name}/{split}:{number}", without_filled_nulls(fields, table.features))

    def sha256(self) -> str:
        """A digest of the records; of a streamed data set, of its commit."""
        if self.is_streamed:
            commit = f"{self.name}@{self._builder.hash}/{self.split or 'train'}"
            return hashlib.sha256(commit.encode()).hexdigest()
        digest = hashlib.sha256()
        for record in self.records():
            digest.update(json.dumps(dict(record.fields), sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @cached_property
    def is_streamed(self) -> bool:
        """Whether records are fetched over the network while they are read."""
        if datasets.config.HF_HUB_OFFLINE or self._builder.hash is None:
            return False
        return self.limited or not fits_disk(self._builder.info, Path(datasets.config.HF_DATASETS_CACHE))

    @cached_property
    def _builder(self) -> Any:
        require_reachable_hub(self.name, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_ENDPOINT)
        repository, _, config = self.name.partition(":")
        with _hub_errors(self.name):
            return datasets.load_dataset_builder(repository, config or None)

    def _table(self, split: str) -> Any:
        builder = self._builder
        if self.is_streamed:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)


def fits_disk(info: Any, folder: Path) -> bool:
    """Whether a data set of the size in `info` fits into the cache folder of `datasets`. Unknown sizes fit."""
    needed = int(info.download_size or 0) + int(info.dataset_size or 0)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return needed <= _DISK_FRACTION * shutil.disk_usage(existing).free


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Any error of the hub's client as a DataError with the data set's name and the reason."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}: no such file or folder here, and not readable as a hub data set: {first_line(error)}. "
            "Check the name, data.train.split and the network."
        ) from error
