"""Parcels: named tensors and a JSON note that one process sends to all others; every byte arrives as it left.

A parcel travels as Accelerate's broadcasts: what is in it, then all tensors one after the other.  Door: accelerate.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import broadcast
from torch import Tensor

ALIGNMENT = 64  # bytes: where a tensor may begin, so that it can be viewed in its own type
Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Payload:
    """Tensors by name, and anything that JSON can say about them."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    note: Any = None


class ProcessGroup(Protocol):
    """Several processes, seen from one of them."""

    rank: int
    world: int
    device: torch.device


def send(company: ProcessGroup, sender: int, parcel: Payload | None) -> Payload:
    """The parcel of process `sender` on every process; the others give None, and get tensors on their own device."""
    if company.world == 1 and parcel is not None:
        return parcel
    header, places, size = _packing(parcel) if parcel is not None else (b"", {}, 0)
    header = _send_bytes(company, sender, header)
    if parcel is None:
        said = json.loads(header)
        places, size = {name: tuple(place) for name, place in said["places"].items()}, said["size"]
        parcel = Payload({}, said["note"])
    body = torch.empty(size, dtype=torch.uint8, device=company.device)
    for name, tensor in parcel.tensors.items():
        start = places[name][0]
        flat = tensor.detach().to(company.device).contiguous().reshape(-1)
        body[start : start + tensor.nbytes] = flat.view(torch.uint8)
    if size:
        broadcast(body, from_process=sender)
    return Payload({name: _view(body, *place) for name, place in places.items()}, parcel.note)


def deal(
    company: ProcessGroup,
    units: Sequence[Unit],
    make: Callable[[Unit], Payload],
    error: type[Exception],
) -> Iterator[tuple[Unit, Payload]]:
    """Each unit with its parcel on every process; they take turns in making one, and work side by side.

    An `error` that `make` raises on one process is raised on all.
    """
    for first in range(0, len(units), company.world):
        turn = units[first : first + company.world]
        mine = _made(make, turn[company.rank], error) if company.rank < len(turn) else None
        for maker, unit in enumerate(turn):
            found = send(company, maker, mine if maker == company.rank else None)
            if maker == company.rank:
                mine = None  # its tensors are in the body that was sent
            if isinstance(found.note, dict) and "failed" in found.note:
                raise error(found.note["failed"])
            yield unit, found


def _made(make: Callable[[Unit], Payload], unit: Unit, error: type[Exception]) -> Payload:
    try:
        return make(unit)
    except error as failed:
        return Payload({}, {"failed": str(failed)})


def _packing(parcel: Payload) -> tuple[bytes, dict[str, tuple[Any, ...]], int]:
    """The header, each tensor's place (start, type, shape), and the body's size."""
    places: dict[str, tuple[Any, ...]] = {}
    end = 0
    for name, tensor in parcel.tensors.items():
        places[name] = (end, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return json.dumps({"places": places, "size": end, "note": parcel.note}).encode(), places, end


def _send_bytes(company: ProcessGroup, sender: int, text: bytes) -> bytes:
    size = torch.tensor([len(text)], device=company.device)
    broadcast(size, from_process=sender)
    body = torch.empty(int(size), dtype=torch.uint8, device=company.device)
    if text:
        body.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    broadcast(body, from_process=sender)
    return bytes(body.cpu().numpy())


def _view(body: Tensor, start: int, dtype: str, shape: Sequence[int]) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    size = kind.itemsize * torch.Size(shape).numel()
    return body[start : start + size].view(kind).view(torch.Size(shape))
