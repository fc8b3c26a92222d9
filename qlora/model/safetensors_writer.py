"""Writer of a model in safetensors, tensor by tensor: one tensor is in memory at a time.

The format (https://github.com/huggingface/safetensors#format) starts with a header of all sizes, which follow from the
shapes.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora.errors import QloraError
from qlora.utils.atomic_files import write_json

SHARD_BYTES = 5 * 10**9
CHUNK = 2**22  # values of a tensor that are rounded, checked and written at a time
SYNC_BYTES = 512 * 2**20  # written between two syncs; a killed export resumes from the last one
PROGRESS = "progress.json"
DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
WIDER_DTYPES = "Take --dtype bfloat16 or float32; nothing was written."
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: name, shape and dtype are known, `make` computes its values when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_model(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    shard_bytes: int | None = None,
    report: Report = lambda done, total: None,
    notes: dict[str, Any] | None = None,
    mark: Mapping[str, str] | None = None,
) -> int:
    """Write model.safetensors, or numbered shards and their index, in the given order; returns all tensors' bytes.

    A shard has at most `shard_bytes`, by default SHARD_BYTES. Resumes an earlier, killed call with the same folder and
    tensors. `notes` is JSON that `make` functions fill; it is saved with the progress. `mark`: metadata of the headers.
    """
    shards = list(_shards(tensors, shard_bytes or SHARD_BYTES))
    total = sum(tensor.size_bytes for tensor in tensors)
    progress = _Progress(folder, {} if notes is None else notes)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for tensor in _write_shard(folder / name, _header(shard, mark or {}), shard, progress):
            weight_map[tensor.name] = name
            done += tensor.size_bytes
            report(done, total)
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return total


class _Progress:
    """How many bytes of each file are synced to disk, saved in PROGRESS."""

    def __init__(self, folder: Path, notes: dict[str, Any]) -> None:
        self.path, self.notes = folder / PROGRESS, notes
        self.files: dict[str, int] = {}
        self._unsynced = 0
        if self.path.is_file():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            self.files = saved["files"]
            notes.update(saved["notes"])

    def advance(self, file: BinaryIO, name: str, end: int, size_bytes: int) -> None:
        """Count a tensor that ends at byte `end`; every SYNC_BYTES sync the file and save the progress."""
        self._unsynced += size_bytes
        if self._unsynced >= SYNC_BYTES or not size_bytes:
            file.flush()
            os.fsync(file.fileno())
            self.files[name], self._unsynced = end, 0
            write_json(self.path, {"files": self.files, "notes": self.notes})


def _shards(tensors: Sequence[PlannedTensor], shard_bytes: int) -> Iterator[list[PlannedTensor]]:
    """Split the sequence into shards of at most `shard_bytes`, or of one larger tensor."""
    shard: list[PlannedTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size_bytes
    if shard:
        yield shard


def _write_shard(
    path: Path, header: bytes, tensors: Sequence[PlannedTensor], progress: _Progress
) -> Iterator[PlannedTensor]:
    synced = progress.files.get(path.name, 0)
    with path.open("r+b" if synced else "wb") as file:
        if synced:
            file.truncate(synced)
            file.seek(synced)
        else:
            file.write(header)
        end = len(header)
        for tensor in tensors:
            end += tensor.size_bytes
            if end > synced:
                _write_tensor(file, tensor)
                progress.advance(file, path.name, end, tensor.size_bytes)
            yield tensor
        if end > synced:
            progress.advance(file, path.name, end, 0)


def _write_tensor(file: BinaryIO, tensor: PlannedTensor) -> None:
    values = tensor.make()
    if tuple(values.shape) != tensor.shape:
        raise AssertionError(f"{tensor.name}: planned {tensor.shape}, made {tuple(values.shape)}")
    for part in values.contiguous().reshape(-1).split(CHUNK):
        chunk = part.to(tensor.dtype)
        if chunk.is_floating_point() and not torch.isfinite(chunk).all():
            dtype = DTYPE_NAMES[tensor.dtype]
            raise QloraError(f"{Path(file.name).name}: {tensor.name} has values beyond {dtype}. {WIDER_DTYPES}")
        file.write(chunk.cpu().view(torch.uint8).numpy().data)


def _header(tensors: Sequence[PlannedTensor], mark: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **mark}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.size_bytes]
        entries[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
