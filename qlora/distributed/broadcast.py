"""Broadcast of named tensors with JSON metadata from one rank to all others, byte for byte.

A payload takes three broadcasts of Accelerate: the size of a JSON header, the header, one buffer with all tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import broadcast as broadcast_tensor
from torch import Tensor

ALIGNMENT = 64  # bytes: the start of a tensor in the buffer, so that it can be viewed in its own type
Unit = TypeVar("Unit")
Slot = tuple[int, str, Sequence[int]]  # of a tensor in the buffer: start, type, shape


@dataclass(frozen=True)
class Payload:
    """Tensors by name, and JSON metadata."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Any = None


class ProcessGroup(Protocol):
    """The ranks of a run, seen from one of them."""

    rank: int
    world_size: int
    device: torch.device


def broadcast(group: ProcessGroup, source: int, payload: Payload | None) -> Payload:
    """The payload of rank `source` on every rank, on its own device; the other ranks pass None."""
    if group.world_size == 1 and payload is not None:
        return payload
    header, slots, size = _layout(payload) if payload is not None else (b"", {}, 0)
    header = _broadcast_bytes(group, source, header)
    if payload is None:
        fields = json.loads(header)
        slots, size = {name: tuple(slot) for name, slot in fields["slots"].items()}, fields["size"]
        payload = Payload({}, fields["metadata"])
    buffer = torch.empty(size, dtype=torch.uint8, device=group.device)
    for name, tensor in payload.tensors.items():
        start = slots[name][0]
        flat = tensor.detach().to(group.device).contiguous().reshape(-1)
        buffer[start : start + tensor.nbytes] = flat.view(torch.uint8)
    if size:
        broadcast_tensor(buffer, from_process=source)
    return Payload({name: _view(buffer, *slot) for name, slot in slots.items()}, payload.metadata)


def broadcast_in_turns(
    group: ProcessGroup,
    units: Sequence[Unit],
    prepare: Callable[[Unit], Payload],
    error: type[Exception],
) -> Iterator[tuple[Unit, Payload]]:
    """Each unit with its payload, on every rank. The ranks prepare in parallel: rank r units r, r + world size, ...

    An `error` that `prepare` raises on one rank is raised on all.
    """
    for first in range(0, len(units), group.world_size):
        batch = units[first : first + group.world_size]
        prepared = _prepared(prepare, batch[group.rank], error) if group.rank < len(batch) else None
        for source, unit in enumerate(batch):
            payload = broadcast(group, source, prepared if source == group.rank else None)
            if source == group.rank:
                prepared = None  # frees its tensors: the broadcast buffer holds them
            if isinstance(payload.metadata, dict) and "failed" in payload.metadata:
                raise error(payload.metadata["failed"])
            yield unit, payload


def _prepared(prepare: Callable[[Unit], Payload], unit: Unit, error: type[Exception]) -> Payload:
    try:
        return prepare(unit)
    except error as failure:
        return Payload({}, {"failed": str(failure)})


def _layout(payload: Payload) -> tuple[bytes, dict[str, Slot], int]:
    """The header, the slot of each tensor, and the size of the buffer."""
    slots: dict[str, Slot] = {}
    end = 0
    for name, tensor in payload.tensors.items():
        slots[name] = (end, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return json.dumps({"slots": slots, "size": end, "metadata": payload.metadata}).encode(), slots, end


def _broadcast_bytes(group: ProcessGroup, source: int, text: bytes) -> bytes:
    size = torch.tensor([len(text)], device=group.device)
    broadcast_tensor(size, from_process=source)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=group.device)
    if text:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    broadcast_tensor(buffer, from_process=source)
    return bytes(buffer.cpu().numpy())


def _view(buffer: Tensor, start: int, dtype: str, shape: Sequence[int]) -> Tensor:
    torch_dtype: torch.dtype = getattr(torch, dtype)
    size = torch_dtype.itemsize * torch.Size(shape).numel()
    return buffer[start : start + size].view(torch_dtype).view(torch.Size(shape))
