"""Flat arrays written piece by piece, to files or to memory, and read back whole: files through the memory map."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

KINDS = {  # little-endian on every machine; `ends` of a ragged column are running sums
    "ids": "<i4",  # token ids of all documents, one after the other
    "trained": "|b1",  # of each token
    "ends": "<i8",  # tokens up to the end of each document
    "where": "|u1",  # UTF-8 of the places the documents came from
    "where_ends": "<i8",
    "train_order": "<i8",  # documents in the order in which the training rows hold them
    "train_ends": "<i8",  # documents up to the end of each training row
    "eval_order": "<i8",
    "eval_ends": "<i8",
}


class Unwritable(OSError):
    """A column could not be written: no room, no permission."""


class Columns:
    """The columns of KINDS while they grow; in `folder`, or in memory without one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._open: dict[str, BinaryIO] = {name: self._begin(name) for name in KINDS}

    def append(self, name: str, values: Array) -> None:
        """Put `values` at the end of a column. Unwritable if the disk refuses."""
        try:
            self._open[name].write(np.ascontiguousarray(values, dtype=KINDS[name]).view(np.uint8).data)
        except OSError as error:
            raise Unwritable(error.errno, error.strerror) from error

    def finish(self, names: Iterable[str]) -> dict[str, Array]:
        """No more will be appended to `names`: the columns for reading. Unwritable if the disk refuses."""
        return {name: self._finished(name) for name in names}

    def close(self) -> None:
        """Let go of files that were not finished."""
        for file in self._open.values():
            with suppress(OSError):  # what a full disk refused is written off
                file.close()

    def _begin(self, name: str) -> BinaryIO:
        if self._folder is None:
            return io.BytesIO()
        try:
            return file_of(self._folder, name).open("wb")
        except OSError as error:
            raise Unwritable(error.errno, error.strerror) from error

    def _finished(self, name: str) -> Array:
        file = self._open.pop(name)
        if isinstance(file, io.BytesIO):
            return np.frombuffer(file.getbuffer(), dtype=KINDS[name])
        try:
            file.close()
        except OSError as error:
            raise Unwritable(error.errno, error.strerror) from error
        return mapped(file_of(self._folder or Path(), name), name)


def file_of(folder: Path, name: str) -> Path:
    """Where a column lies."""
    return folder / f"{name}.bin"


def mapped(path: Path, name: str) -> Array:
    """A column as a read-only memory map: its pages come and go with use."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=KINDS[name])
    return np.memmap(path, dtype=KINDS[name], mode="r")


def read(folder: Path, digests: Mapping[str, str]) -> dict[str, Array]:
    """All columns of `folder`. OSError or ValueError unless each is there and has its sha256."""
    for name in KINDS:
        with file_of(folder, name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digests.get(name):
                raise ValueError(f"{name} is damaged")
    return {name: mapped(file_of(folder, name), name) for name in KINDS}


def digests_of(folder: Path) -> dict[str, str]:
    """The sha256 of every column in `folder`."""
    found = {}
    for name in KINDS:
        with file_of(folder, name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
