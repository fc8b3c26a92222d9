"""A model written to safetensors tensor by tensor, so that only the tensor at hand is in memory.

The format (https://github.com/huggingface/safetensors#format) puts all sizes in a header first; they follow
from the shapes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.errors import QloraError
from qlora.files import write_json

SHARD_BYTES = 5 * 10**9
NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
WIDER = "Take --dtype bfloat16 or float32; nothing was written."
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, shape and dtype now, its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_model(
    folder: Path, tensors: Sequence[Planned], shard_bytes: int = SHARD_BYTES, report: Report = lambda done, total: None
) -> int:
    """Write model.safetensors, or numbered shards and their index, in the order given; returns all tensors' bytes."""
    shards = list(_shards(tensors, shard_bytes))
    total = sum(tensor.size_bytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for tensor in _write_shard(folder / name, shard):
            weight_map[tensor.name] = name
            done += tensor.size_bytes
            report(done, total)
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return total


def _shards(tensors: Sequence[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    """Cut the sequence so that a shard holds at most `shard_bytes`, or one tensor that is larger by itself."""
    shard: list[Planned] = []
    for tensor in tensors:
        if shard and sum(other.size_bytes for other in shard) + tensor.size_bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    if shard:
        yield shard


def _write_shard(path: Path, tensors: Sequence[Planned]) -> Iterator[Planned]:
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            values = tensor.make().to(tensor.dtype).contiguous()
            if tuple(values.shape) != tensor.shape:
                raise AssertionError(f"{tensor.name}: planned {tensor.shape}, made {tuple(values.shape)}")
            if values.is_floating_point() and not torch.isfinite(values).all():
                raise QloraError(f"{path.name}: {tensor.name} has values beyond {NAMES[tensor.dtype]}. {WIDER}")
            file.write(values.cpu().reshape(-1).view(torch.uint8).numpy().data)
            yield tensor


def _header(tensors: Sequence[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.size_bytes]
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
