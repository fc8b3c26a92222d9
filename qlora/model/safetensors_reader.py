"""Reader of a model folder's tensors: one safetensors file or several shards, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.model_folder import INDEX, SINGLE
from qlora.utils.atomic_files import is_bare_name, read_json

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}  # bytes
MAPPED_BYTES = 128 * 2**20  # read through one mapping of a file before the file is opened again


class SafetensorsReader(CheckpointReader):
    """Key -> tensor over all files of a folder; a tensor is read on access and not kept.

    A file is opened again every `mapped_bytes`: pages that were read do not stay in this process's resident memory.
    """

    def __init__(self, folder: Path, files: Mapping[str, str] | None = None, mapped_bytes: int = MAPPED_BYTES) -> None:
        self.folder = folder
        self.mapped_bytes = mapped_bytes
        self.files = _files_by_key(folder) if files is None else files
        self._open: dict[str, Any] = {}
        self._mapped_bytes = 0

    def __getitem__(self, key: str) -> Tensor:
        """The tensor `key`, on the CPU in its stored dtype. BaseModelError if the file is damaged or lacks it."""
        return self._read(key, lambda: self._handle(self.files[key]).get_tensor(key))

    def part(self, key: str, index: int) -> Tensor:
        """The slice `index` >= 0 of the tensor's dimension 0, read without the rest of the tensor."""
        return self._read(key, lambda: self._slice(key)[index])

    def _read(self, key: str, read: Callable[[], Tensor]) -> Tensor:
        try:
            tensor = read()
        except (SafetensorError, OSError, IndexError) as error:
            raise BaseModelError(f"model: {self.folder / self.files[key]}: can't read {key!r}: {error}") from error
        self._mapped_bytes += tensor.nbytes
        return tensor

    def for_another_thread(self) -> "SafetensorsReader":
        """A reader of the same tensors with file mappings of its own: a mapping must not be shared by threads."""
        return SafetensorsReader(self.folder, self.files, self.mapped_bytes)

    def __iter__(self) -> Iterator[str]:
        """Keys file by file, so that each file is read once, in order."""
        return iter(sorted(self.files, key=lambda key: (self.files[key], key)))

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, key: object) -> bool:
        return key in self.files

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data."""
        return tuple(self._slice(key).get_shape())

    def size_bytes(self, key: str) -> int:
        """The tensor's bytes in the file, without reading its data."""
        header = self._slice(key)
        return int(prod(header.get_shape())) * WIDTHS.get(str(header.get_dtype()), 1)

    def is_float(self, key: str) -> bool:
        """Whether the tensor holds floating point numbers, without reading its data."""
        return self.dtype(key).startswith(("F", "BF"))

    def dtype(self, key: str) -> str:
        """The dtype in the file's header, such as F8_E4M3, without reading its data."""
        return str(self._slice(key).get_dtype())

    def _slice(self, key: str) -> Any:
        """Shape and dtype of a tensor from the file's header."""
        try:
            return self._handle(self.files[key]).get_slice(key)
        except SafetensorError as error:
            raise BaseModelError(f"model: {self.folder / self.files[key]}: can't read {key!r}: {error}") from error

    def _handle(self, file: str) -> Any:
        if file not in self._open or self._mapped_bytes > self.mapped_bytes:
            self._open, self._mapped_bytes = {file: _opened(self.folder / file)}, 0
        return self._open[file]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"model: {path} is not a complete safetensors file: {error}") from error


def _files_by_key(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        return _from_index(folder)
    names = [SINGLE] if (folder / SINGLE).is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
    return {key: name for name in names for key in _opened(folder / name).keys()}  # noqa: SIM118


def _from_index(folder: Path) -> dict[str, str]:
    """The index's weight map; every file in it must be a bare name inside the folder."""
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        files = {str(key): str(file) for key, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"model: {folder / INDEX} is not a safetensors index: {error!r}") from error
    for file in sorted(set(files.values())):
        if not is_bare_name(file) or not file.endswith(".safetensors"):
            raise BaseModelError(
                f"model: {folder / INDEX}: found {file!r}, allowed: *.safetensors files of its own folder."
            )
        if not (folder / file).is_file():
            raise BaseModelError(f"model: {folder / INDEX} names {file}, which is missing. Fetch the folder again.")
    return files
