"""A side CUDA stream for copies between host and device; on a CPU the same calls copy at once.

Two rules keep it correct. A queued copy starts after the work that the compute stream had been given before
`wait_for_compute`. It is complete for the compute stream after `make_compute_wait` on an event recorded behind it. In
between, its source must not change and its target must not be used.
"""

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

from qlora.errors import QloraError

PAGE_BYTES = mmap.PAGESIZE


class CopyStream:
    """A queue of copies that runs in parallel with the compute stream of `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_compute(self) -> None:
        """Copies queued from here on start after everything that the compute stream has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue target <- source."""
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> Any:
        """An event behind everything queued so far."""
        return None if self._stream is None else self._stream.record_event()

    def make_compute_wait(self, event: Any) -> None:
        """Work given to the compute stream from here on starts after the event; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        """Block the host until every queued copy is complete."""
        if self._stream is not None:
            self._stream.synchronize()


def host_bytes(size: int, device: torch.device) -> Tensor:
    """`size` bytes of host memory, uint8 [size]; pinned where `device` is a GPU, so that it copies asynchronously.

    Registered with the driver instead of taken from torch's pinned pool, which rounds sizes up to a power of two.
    """
    if device.type != "cuda" or not size:
        return torch.empty(size, dtype=torch.uint8)
    # Whole pages of its own: two registered ranges must not share a page.
    memory = torch.empty(-(-size // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE_BYTES
    memory = memory[start : start + -(-size // PAGE_BYTES) * PAGE_BYTES]
    driver: Any = torch.cuda.cudart()
    status = driver.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status) != 0:
        raise QloraError(
            f"memory: the driver can't pin {size / 2**20:,.0f} MiB of host memory ({status}). Free host memory or "
            "raise the limit on locked memory (ulimit -l), or set memory.weights: resident and "
            "memory.offload_activations: false."
        )
    # Of the storage, not the tensor: views of the memory outlive the tensor.
    weakref.finalize(memory.untyped_storage(), driver.cudaHostUnregister, memory.data_ptr())
    return memory[:size]
