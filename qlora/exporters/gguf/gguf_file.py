"""GGUF files: a writer that holds one tensor at a time, and a reader of what is in a file.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): metadata, the tensors' names and shapes, then
their bytes. The module that imports the package `gguf`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.errors import InputError, QloraError, first_line
from qlora.exporters.gguf import MISSING

CHUNK_VALUES = 2**22  # of a tensor that are converted and checked at a time
Value = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
Report = Callable[[int, int], None]


def require_gguf() -> Any:
    """The package `gguf`. InputError without it."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"--to gguf {MISSING} ({first_line(error)})") from error
    return gguf


@dataclass(frozen=True)
class PlannedGguf:
    """A tensor to be written: `make` computes its values [..., I] when they are written, in any float dtype."""

    name: str
    shape: tuple[int, ...]
    storage: str  # float32, float16, bfloat16, or a name of GGML's quantized types in lower case
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        block, block_bytes = _block(self.storage)
        return prod(self.shape) // block * block_bytes


def storage_for(shape: Sequence[int], storage: str) -> str:
    """`storage`, if rows of this shape consist of whole blocks of it; else float16."""
    return storage if shape[-1] % _block(storage)[0] == 0 else "float16"


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Sequence[PlannedGguf],
    report: Report = lambda done, total: None,
) -> int:
    """Write a file; returns the bytes of its tensors. QloraError for a value that a dtype can't hold.

    A list must not be empty: its first element has the type of all. An int is written as uint32.
    """
    gguf = require_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(gguf, writer, key, value)
        for tensor in tensors:
            shape, dtype = _stored_shape(tensor)
            writer.add_tensor_info(tensor.name, shape, dtype, tensor.size_bytes, raw_dtype=_type(tensor.storage))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.size_bytes for tensor in tensors)
        for tensor in tensors:
            writer.write_tensor_data(_bytes(path, tensor))
            done += tensor.size_bytes
            report(done, total)
    finally:
        writer.close()
    return done


class GgufFile:
    """A file on disk: its metadata, and its tensors as float32. QloraError if it can't be read."""

    def __init__(self, path: Path) -> None:
        self.path, self._gguf = path, require_gguf()
        try:
            self._reader = self._gguf.GGUFReader(path)
        except Exception as error:  # a damaged file can raise anything in the package
            raise QloraError(f"{path} can't be read as GGUF: {first_line(error)}. Export it again.") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key; `default` if the file lacks it."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.get("general.architecture"))

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, rows first. QloraError if there is no such tensor."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def values(self, name: str, part: int | None = None) -> Tensor:
        """The tensor dequantized to float32, or the slice `part` of its dimension 0."""
        tensor = self._tensor(name)
        stored = tensor.data if part is None else tensor.data[part]
        return torch.from_numpy(np.array(self._gguf.dequantize(stored, tensor.tensor_type), dtype=np.float32))

    def storages(self) -> dict[str, int]:
        """Name of GGML's type, in lower case -> how many tensors are stored so."""
        names = [tensor.tensor_type.name.lower() for tensor in self._reader.tensors]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            raise QloraError(f"{self.path}: there is no tensor {name!r}. Export it again.")
        return self.tensors[name]


def tensor_namer(architecture: str, layers: int) -> Callable[[str], str | None]:
    """Transformers' parameter names -> names in a file, for one of llama.cpp's architectures; None for an unknown one.

    InputError for an architecture that the package does not know.
    """
    gguf = require_gguf()
    types = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in types:
        raise InputError(f"--to gguf: the installed package gguf does not know {architecture}: upgrade it.")
    names = gguf.get_tensor_name_map(types[architecture], layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def file_type(storage: str) -> int:
    """`general.file_type`: which type most matrices are stored in."""
    names = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    return int(require_gguf().LlamaFileType[names.get(storage, f"MOSTLY_{storage.upper()}")])


def _type(storage: str) -> Any:
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return require_gguf().GGMLQuantizationType[names.get(storage, storage.upper())]


def _block(storage: str) -> tuple[int, int]:
    """Values and bytes of one block."""
    values, size = require_gguf().GGML_QUANT_SIZES[_type(storage)]
    return int(values), int(size)


def _stored_shape(tensor: PlannedGguf) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype as the package's writer takes them: blocks are counted in bytes."""
    block, size = _block(tensor.storage)
    if block > 1:
        return (*tensor.shape[:-1], tensor.shape[-1] // block * size), np.dtype(np.uint8)
    return tensor.shape, np.dtype({"float32": np.float32, "float16": np.float16}.get(tensor.storage, np.uint16))


def _bytes(path: Path, tensor: PlannedGguf) -> np.ndarray[Any, Any]:
    """The tensor's values as they are stored, converted a few rows at a time."""
    values = tensor.make()
    if tuple(values.shape) != tensor.shape:
        raise AssertionError(f"{tensor.name}: planned {tensor.shape}, made {tuple(values.shape)}")
    shape, dtype = _stored_shape(tensor)
    stored = np.empty(shape, dtype)
    rows, out = values.reshape(-1, tensor.shape[-1]), stored.reshape(-1, shape[-1])
    step = max(1, CHUNK_VALUES // tensor.shape[-1])
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].to("cpu", torch.float32)
        narrow = chunk.to(torch.float16) if tensor.storage == "float16" else chunk
        if not torch.isfinite(narrow).all():
            raise QloraError(
                f"{path.name}: {tensor.name} has values beyond {tensor.storage}. "
                "Take --dtype bfloat16 or float32; nothing was written."
            )
        out[start : start + step] = _convert(chunk, tensor.storage)
    return stored


def _convert(chunk: Tensor, storage: str) -> np.ndarray[Any, Any]:
    if storage == "bfloat16":
        return chunk.to(torch.bfloat16).view(torch.uint16).numpy()
    if storage in ("float32", "float16"):
        return chunk.to(getattr(torch, storage)).numpy()
    return require_gguf().quantize(np.ascontiguousarray(chunk.numpy()), _type(storage))  # type: ignore[no-any-return]


def _add(gguf: Any, writer: Any, key: str, value: Value) -> None:
    if isinstance(value, str | bool | int | float):
        writer.add_key_value(key, value, _value_type(gguf, value, "UINT32"))
    else:
        items: list[Any] = list(value)
        sub_type = _value_type(gguf, items[0], "INT32")
        writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, sub_type=sub_type)


def _value_type(gguf: Any, value: Any, integer: str) -> Any:
    names = {bool: "BOOL", str: "STRING", float: "FLOAT32", int: integer}
    return gguf.GGUFValueType[names[type(value)]]
