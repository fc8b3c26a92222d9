"""The base's tensors on disk: one safetensors file or many, read one tensor at a time.  Door: safetensors (reading)."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.utils.atomic_files import plain_name, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}  # bytes
MAPPED_BYTES = 128 * 2**20  # read through one mapping of a file before it is opened anew


class Shards(Mapping[str, Tensor]):
    """Key -> tensor over all shards of a folder; a tensor is read when asked for, and nothing is kept.

    A file is opened anew every MAPPED_BYTES, so that the pages read before are not counted as this process's memory.
    """

    def __init__(self, folder: Path, files: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.files = _files_by_key(folder) if files is None else files
        self._open: dict[str, Any] = {}
        self._mapped_bytes = 0

    def __getitem__(self, key: str) -> Tensor:
        """The tensor `key`, on the CPU in its stored dtype. BaseModelError if the file is damaged or lacks it."""
        try:
            tensor: Tensor = self._handle(self.files[key]).get_tensor(key)
            self._mapped_bytes += tensor.nbytes
            return tensor
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"model: {self.folder / self.files[key]}: can't read {key!r}: {error}") from error

    def beside(self) -> "Shards":
        """The same tensors for another thread, which must not share a mapping with this one."""
        return Shards(self.folder, self.files)

    def __iter__(self) -> Iterator[str]:
        """Keys file by file, so that each shard is walked once."""
        return iter(sorted(self.files, key=lambda key: (self.files[key], key)))

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, key: object) -> bool:
        return key in self.files

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data."""
        return tuple(self._described(key).get_shape())

    def size_bytes(self, key: str) -> int:
        """The tensor's bytes in the file, without reading its data."""
        described = self._described(key)
        return int(prod(described.get_shape())) * WIDTHS.get(str(described.get_dtype()), 1)

    def is_float(self, key: str) -> bool:
        """Whether the tensor holds floating point numbers, without reading its data."""
        return str(self._described(key).get_dtype()).startswith(("F", "BF"))

    def _described(self, key: str) -> Any:
        """Shape and type of a tensor, as the file's header has them."""
        try:
            return self._handle(self.files[key]).get_slice(key)
        except SafetensorError as error:
            raise BaseModelError(f"model: {self.folder / self.files[key]}: can't read {key!r}: {error}") from error

    def _handle(self, file: str) -> Any:
        if file not in self._open or self._mapped_bytes > MAPPED_BYTES:
            self._open, self._mapped_bytes = {file: _opened(self.folder / file)}, 0
        return self._open[file]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"model: {path} is not a whole safetensors file: {error}") from error


def _files_by_key(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        return _from_index(folder)
    names = [SINGLE] if (folder / SINGLE).is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
    return {key: name for name in names for key in _opened(folder / name).keys()}  # noqa: SIM118


def _from_index(folder: Path) -> dict[str, str]:
    """The index's weight map; every file it names must be a plain name inside the folder."""
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        files = {str(key): str(file) for key, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"model: {folder / INDEX} is no safetensors index: {error!r}") from error
    for file in sorted(set(files.values())):
        if not plain_name(file) or not file.endswith(".safetensors"):
            raise BaseModelError(f"model: {folder / INDEX} points to {file!r}; only files of its own folder are read.")
        if not (folder / file).is_file():
            raise BaseModelError(f"model: {folder / INDEX} names {file}, which is not there. Fetch the folder again.")
    return files
