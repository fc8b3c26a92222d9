"""Parking: what a layer keeps for backward waits in host memory, and is back on the device before backward needs it.

Forward copies it out while the next layer runs, backward fetches a layer's while the one above runs, so that two layers
of it are on the device at a time. The last layers are not parked: backward would ask for them at once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora.memory.copy_stream import CopyStream, host_bytes

SMALLEST_BYTES = 2**16  # of a storage that is worth a copy


class ActivationOffloader:
    """Parks what the first `layers` decoder layers keep."""

    def __init__(self, layers: int, lane: CopyStream, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.layers, self.lane, self.smallest_bytes = layers, lane, smallest_bytes
        self.host_bytes = 0  # taken so far; buffers are used again and again
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._top: _Layer | None = None

    @contextmanager
    def parked(self, position: int, shared: Iterable[Tensor]) -> Iterator[None]:
        """Around the forward of decoder layer `position`; what it keeps of `shared` (weights, masks) stays in place."""
        stays = {tensor.untyped_storage().data_ptr() for tensor in shared}
        layer = _Layer(self, below=self._top if position else None)
        with saved_tensors_hooks(lambda tensor: self._pack(tensor, layer, stays), self._unpack):
            yield
        layer.left = self.lane.mark()
        self.settle(layer.below)
        self._top = layer

    def settle(self, layer: Optional["_Layer"] = None) -> None:
        """Let go, on the device, of what a layer parked (by default the last one that did)."""
        layer = layer or self._top
        if layer and layer.leaving:
            self.lane.wait(layer.left)
            layer.leaving.clear()

    def take(self, size: int) -> Tensor:
        """Host memory for one storage."""
        if self._free[size]:
            return self._free[size].pop()
        self.host_bytes += size
        return host_bytes(size, self.lane.device)

    def _pack(self, tensor: Tensor, layer: "_Layer", stays: set[int]) -> Any:
        storage = tensor.untyped_storage()
        elsewhere = tensor.device.type != self.lane.device.type
        if elsewhere or storage.nbytes() < self.smallest_bytes or storage.data_ptr() in stays:
            return tensor
        # A write in place makes a new version, which is another value.
        key = (storage.data_ptr(), tensor._version)
        parked = layer.known.get(key) or layer.park(key, tensor)
        return _Saved(parked, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Any) -> Tensor:
        return saved.restored() if isinstance(saved, _Saved) else saved  # type: ignore[no-any-return]

    def give_back(self, memory: Tensor) -> None:
        """Host memory that is free again; a copy from it that is still queued comes before the next one into it."""
        self._free[memory.numel()].append(memory)


class _Layer:
    """What one layer's forward parked; knows the layer below, which backward needs next."""

    def __init__(self, parking: ActivationOffloader, below: Optional["_Layer"]) -> None:
        self.parking, self.below = parking, below
        self.known: WeakValueDictionary[tuple[int, int], _Parked] = WeakValueDictionary()
        self.leaving: list[Tensor] = []  # kept on the device until their copies are made
        self.left: Any = None
        self._coming: Any = None
        self._fetched = self._here = False

    def park(self, key: tuple[int, int], tensor: Tensor) -> "_Parked":
        """Queue the copy of a whole storage to the host."""
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.parking.lane.follow()
        parked = self.known[key] = _Parked(self, flat)
        self.leaving.append(flat)
        return parked

    def fetch(self) -> None:
        """Queue the copies back to the device, once."""
        if self._fetched:
            return
        self._fetched = True
        waiting = list(self.known.values())
        for parked in waiting:
            parked.on_device = torch.empty_like(parked.on_host, device=self.parking.lane.device)
        self.parking.lane.follow()
        for parked in waiting:
            self.parking.lane.copy(parked.on_device, parked.on_host)
        self._coming = self.parking.lane.mark()

    def arrive(self) -> None:
        """Everything is back for the computation; the layer below sets out."""
        if self._here:
            return
        self.fetch()
        self.parking.lane.wait(self._coming)
        self._here = True
        if self.below:
            self.parking.settle(self.below)
            self.below.fetch()


class _Parked:
    """One storage in host memory; lives as long as autograd holds something of it."""

    def __init__(self, layer: _Layer, flat: Tensor) -> None:
        self.layer = layer
        self.on_host = layer.parking.take(flat.numel())
        self.on_device = torch.empty(0, dtype=torch.uint8)  # until it is fetched
        finalize(self, layer.parking.give_back, self.on_host)
        layer.parking.lane.copy(self.on_host, flat)


@dataclass(frozen=True)
class _Saved:
    """What autograd holds in place of a tensor: the storage and how the tensor lies in it."""

    parked: _Parked
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def restored(self) -> Tensor:
        """The tensor on the device, laid out as it was."""
        self.parked.layer.arrive()
        return self.parked.on_device.view(self.dtype).as_strided(self.shape, self.stride, self.offset)
