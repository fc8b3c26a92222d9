"""Activation offloading: tensors saved for backward are in pinned host memory until backward needs them.

Forward copies a layer's tensors to the host while the next layer runs; backward fetches them while the layer above
runs, so that the tensors of two layers are on the device at a time. The last layers are not offloaded, since backward
needs their tensors at once.
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

SMALLEST_BYTES = 2**16  # storages below this size are not offloaded


class ActivationOffloader:
    """Offloads what the first `layers` decoder layers save for backward."""

    def __init__(self, layers: int, copy_stream: CopyStream, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.layers, self.copy_stream, self.smallest_bytes = layers, copy_stream, smallest_bytes
        self.host_bytes = 0  # allocated so far; buffers are reused
        self._free: dict[int, list[Tensor]] = defaultdict(list)  # size -> host buffers
        self._top: _Layer | None = None  # the layer that was offloaded last

    @contextmanager
    def offloaded(self, position: int, shared: Iterable[Tensor]) -> Iterator[None]:
        """Around the forward of decoder layer `position`. Tensors of `shared` (weights, masks) stay on the device."""
        resident = {tensor.untyped_storage().data_ptr() for tensor in shared}
        layer = _Layer(self, below=self._top if position else None)
        with saved_tensors_hooks(lambda tensor: self._pack(tensor, layer, resident), self._unpack):
            yield
        layer.offload_event = self.copy_stream.record()
        self.release(layer.below)
        self._top = layer

    def release(self, layer: Optional["_Layer"] = None) -> None:
        """Free the device memory of a layer's offloaded tensors (by default of the layer offloaded last)."""
        layer = layer or self._top
        if layer and layer.offloading:
            self.copy_stream.make_compute_wait(layer.offload_event)
            layer.offloading.clear()

    def allocate(self, size: int) -> Tensor:
        """Host memory for one storage."""
        if self._free[size]:
            return self._free[size].pop()
        self.host_bytes += size
        return host_bytes(size, self.copy_stream.device)

    def free(self, memory: Tensor) -> None:
        """Make host memory available again. A copy from it that is still queued runs before the next copy into it."""
        self._free[memory.numel()].append(memory)

    def _pack(self, tensor: Tensor, layer: "_Layer", resident: set[int]) -> Any:
        storage = tensor.untyped_storage()
        other_device = tensor.device.type != self.copy_stream.device.type
        if other_device or storage.nbytes() < self.smallest_bytes or storage.data_ptr() in resident:
            return tensor
        # An in-place write makes a new version, whose values differ.
        key = (storage.data_ptr(), tensor._version)
        offloaded = layer.storages.get(key) or layer.offload(key, tensor)
        return _Saved(offloaded, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Any) -> Tensor:
        return saved.restored() if isinstance(saved, _Saved) else saved  # type: ignore[no-any-return]


class _Layer:
    """The offloaded storages of one layer's forward, and the layer below it, which backward needs next."""

    def __init__(self, offloader: ActivationOffloader, below: Optional["_Layer"]) -> None:
        self.offloader, self.copy_stream, self.below = offloader, offloader.copy_stream, below
        self.storages: WeakValueDictionary[tuple[int, int], _Storage] = WeakValueDictionary()
        self.offloading: list[Tensor] = []  # device memory that is needed until its copies are complete
        self.offload_event: Any = None
        self._fetch_event: Any = None
        self._fetched = self._ready = False

    def offload(self, key: tuple[int, int], tensor: Tensor) -> "_Storage":
        """Queue the copy of the tensor's storage to the host."""
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.copy_stream.wait_for_compute()
        storage = self.storages[key] = _Storage(self, flat)
        self.offloading.append(flat)
        return storage

    def fetch(self) -> None:
        """Queue the copies back to the device, once."""
        if self._fetched:
            return
        self._fetched = True
        storages = list(self.storages.values())
        for storage in storages:
            storage.on_device = torch.empty_like(storage.on_host, device=self.copy_stream.device)
        self.copy_stream.wait_for_compute()
        for storage in storages:
            self.copy_stream.copy(storage.on_device, storage.on_host)
        self._fetch_event = self.copy_stream.record()

    def wait_ready(self) -> None:
        """Make the compute stream wait for this layer's tensors, and start to fetch those of the layer below."""
        if self._ready:
            return
        self.fetch()
        self.copy_stream.make_compute_wait(self._fetch_event)
        self._ready = True
        if self.below:
            self.offloader.release(self.below)
            self.below.fetch()


class _Storage:
    """One storage in host memory; exists as long as autograd holds a tensor of it."""

    def __init__(self, layer: _Layer, flat: Tensor) -> None:
        self.layer = layer
        self.on_host = layer.offloader.allocate(flat.numel())
        self.on_device = torch.empty(0, dtype=torch.uint8)  # until it is fetched
        finalize(self, layer.offloader.free, self.on_host)
        layer.copy_stream.copy(self.on_host, flat)


@dataclass(frozen=True)
class _Saved:
    """What autograd holds in place of a tensor: the storage, and the tensor's view of it."""

    storage: _Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def restored(self) -> Tensor:
        """The tensor on the device, in its original layout."""
        self.storage.layer.wait_ready()
        return self.storage.on_device.view(self.dtype).as_strided(self.shape, self.stride, self.offset)
