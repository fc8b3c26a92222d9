"""Pinned host memory: what the driver was asked to register, and what torch's pinned pool gives."""

from typing import Any

from torch import Tensor

from support.pretended_gpu.storages import host_state, state_of

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class PinnedMemory:
    """The registered ranges of host memory, by address. It is also torch.cuda.cudart(), as far as that pins memory."""

    def __init__(self, limit_bytes: int = 2**62) -> None:
        self.limit_bytes = limit_bytes
        self.ranges: dict[int, int] = {}
        self.errors: list[str] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        """Pin a range; 0, or the driver's error number."""
        if sum(self.ranges.values()) + size > self.limit_bytes:
            return OUT_OF_MEMORY
        if any(start < address + size and address < start + length for start, length in self.ranges.items()):
            self.errors.append("a range was registered twice")
        self.ranges[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """Unpin a range."""
        if self.ranges.pop(address, None) is None:
            self.errors.append("a range was unregistered that was not registered")
        return 0

    def pin(self, tensor: Tensor) -> Tensor:
        """Let a new tensor count as one of torch's pinned pool."""
        host_state(tensor).pinned = True
        return tensor

    def is_pinned(self, tensor: Tensor, *_: Any) -> bool:
        """Whether a tensor in host memory is pinned."""
        state = state_of(tensor)
        if state is not None and state.pinned:
            return True
        address = tensor.data_ptr()
        return any(start <= address < start + size for start, size in self.ranges.items())
