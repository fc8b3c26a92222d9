"""Where a storage is: on the pretended GPU, in pinned or in pageable host memory; and who used it last.

All numbers are in host memory. Whether a storage counts as the GPU's is an attribute of the storage, which every view
of it shares and which ends with it.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ATTRIBUTE = "_pretended_gpu_state"
NATIVE_DEVICE = torch._C.TensorBase.device.__get__  # of a tensor, before `device` is replaced
NATIVE_TO = torch._C.TensorBase.to


@dataclass(eq=False)
class StorageState:
    """What is known about one storage; times are launches of the compute stream."""

    on_gpu: bool
    pinned: bool = False
    managed: bool = False  # paged by the driver: both sides may use it
    written: int = 0
    used: int = 0
    # Copies on side streams that are not complete for everybody yet.
    reading: list[Any] = field(default_factory=list)
    writing: list[Any] = field(default_factory=list)


@dataclass
class GpuMemory:
    """Bytes of the storages on the GPU, now and at most."""

    allocated: int = 0
    peak: int = 0
    _references: dict[int, Any] = field(default_factory=dict)

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        size, key = storage.nbytes(), id(storage)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

        def free(_: Any) -> None:
            self.allocated -= size
            self._references.pop(key, None)

        self._references[key] = weakref.ref(storage, free)


memory = GpuMemory()


class Clock:
    """Counts launches on the compute stream. One for all blocks: tensors of the GPU outlive a block in caches."""

    now = 0

    @classmethod
    def tick(cls) -> int:
        """The number of the next launch."""
        cls.now += 1
        return cls.now


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor, or of the local part of a sharded one; None where it has none."""
    try:
        return getattr(tensor, "_local_tensor", tensor).untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def state_of(tensor: Tensor) -> StorageState | None:
    """The state of a tensor's storage; None for pageable host memory that no copy uses."""
    storage = storage_of(tensor)
    return None if storage is None else getattr(storage, ATTRIBUTE, None)


def host_state(tensor: Tensor) -> StorageState:
    """The state of a storage in host memory, new if it has none."""
    state = state_of(tensor) or StorageState(on_gpu=False)
    setattr(tensor.untyped_storage(), ATTRIBUTE, state)
    return state


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the pretended GPU."""
    state = state_of(tensor)
    return state is not None and state.on_gpu


def put_on_gpu(tensor: Tensor, time: int) -> Tensor:
    """Let the storage of a new tensor count as the GPU's, allocated at `time`."""
    storage = storage_of(tensor)
    if storage is not None and NATIVE_DEVICE(tensor).type == "cpu":
        setattr(storage, ATTRIBUTE, StorageState(on_gpu=True, written=time, used=time))
        memory.add(storage)
    return tensor


def is_gpu(device: Any) -> bool:
    """Whether a device, its name or its index means the GPU."""
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"
