"""A column store: flat arrays appended to files or to memory, and read back through a memory map."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES = {  # of each column, little-endian on every machine. `ends` of a ragged column are running sums.
    "ids": "<i4",  # token ids of all examples, one after the other
    "trained": "|b1",  # of each token
    "ends": "<i8",  # tokens up to the end of each example
    "branches": "<i8",  # start and parent of each branch of all examples
    "branch_ends": "<i8",  # branches up to the end of each example
    "sides": "<i8",  # start and role of each side of all examples
    "side_ends": "<i8",  # sides up to the end of each example
    "where": "|u1",  # UTF-8 of the examples' file:line
    "where_ends": "<i8",
    "train_order": "<i8",  # examples in the order in which the training sequences hold them
    "train_ends": "<i8",  # examples up to the end of each training sequence
    "eval_order": "<i8",
    "eval_ends": "<i8",
}

_TYPES = {name: np.dtype(text) for name, text in DTYPES.items()}


class ColumnWriteError(OSError):
    """A column can't be written: the disk is full, or permission is missing."""


class Columns:
    """The columns of DTYPES while they are written: to files in `folder`, or to memory if it is None."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._open: dict[str, BinaryIO] = {name: self._create(name) for name in DTYPES}

    def append(self, name: str, values: Array) -> None:
        """Append `values` to a column. ColumnWriteError if they can't be written."""
        if len(values):
            self._write(name, np.ascontiguousarray(values, dtype=_TYPES[name]).data)

    def append_number(self, name: str, value: int) -> None:
        """Append one value to a column of `<i8`. ColumnWriteError if it can't be written."""
        self._write(name, value.to_bytes(8, "little", signed=True))

    def append_bytes(self, name: str, values: bytes) -> None:
        """Append to a column of `|u1`. ColumnWriteError if they can't be written."""
        self._write(name, values)

    def _write(self, name: str, data: bytes | memoryview) -> None:
        try:
            self._open[name].write(data)
        except OSError as error:
            raise ColumnWriteError(error.errno, error.strerror) from error

    def finish(self, names: Iterable[str]) -> dict[str, Array]:
        """Close the columns `names` and return them as arrays. ColumnWriteError if they can't be written."""
        return {name: self._finish(name) for name in names}

    def close(self) -> None:
        """Close the files of columns that were not finished."""
        for file in self._open.values():
            with suppress(OSError):  # data that a full disk did not take is discarded
                file.close()

    def _create(self, name: str) -> BinaryIO:
        if self._folder is None:
            return io.BytesIO()
        try:
            return column_path(self._folder, name).open("wb")
        except OSError as error:
            raise ColumnWriteError(error.errno, error.strerror) from error

    def _finish(self, name: str) -> Array:
        file = self._open.pop(name)
        if isinstance(file, io.BytesIO):
            return np.frombuffer(file.getbuffer(), dtype=DTYPES[name])
        try:
            file.close()
        except OSError as error:
            raise ColumnWriteError(error.errno, error.strerror) from error
        return memory_map(column_path(self._folder or Path(), name), name)


def column_path(folder: Path, name: str) -> Path:
    """The file of a column."""
    return folder / f"{name}.bin"


def memory_map(path: Path, name: str) -> Array:
    """A column as a read-only memory map: the system loads and drops its pages as needed."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=DTYPES[name])
    return np.memmap(path, dtype=DTYPES[name], mode="r")


def read(folder: Path, digests: Mapping[str, str]) -> dict[str, Array]:
    """All columns in `folder`. OSError or ValueError if one is missing or its sha256 differs."""
    for name in DTYPES:
        with column_path(folder, name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digests.get(name):
                raise ValueError(f"{name} is damaged")
    return {name: memory_map(column_path(folder, name), name) for name in DTYPES}


def digests_of(folder: Path) -> dict[str, str]:
    """The sha256 of every column in `folder`."""
    digests = {}
    for name in DTYPES:
        with column_path(folder, name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
