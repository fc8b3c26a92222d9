"""The lane: copies between the device and host memory beside the computation; on a CPU the same calls copy at once.

The rules that make it safe: a copy starts after what the computation was given before `follow`, and is over for the
computation after `wait` for a mark set behind it. Until then its source stays as it is and its target is left alone.
"""

import weakref
from typing import Any

import torch
from torch import Tensor


class CopyStream:
    """One queue of copies beside the computation on `device`: a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """What is queued from here on waits for everything the computation was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue target <- source."""
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """A mark behind everything queued so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """What the computation is given from here on comes after the mark; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """Wait here, on the host, until everything queued is copied."""
        if self._stream is not None:
            self._stream.synchronize()


def host_bytes(size: int, device: torch.device) -> Tensor:
    """`size` bytes of main memory, uint8 [size], that `device` copies from and to without the host's help.

    Registered rather than taken from torch's pinned pool, which rounds every size up to a power of two.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        driver: Any = torch.cuda.cudart()
        status = driver.cudaHostRegister(memory.data_ptr(), size, 0)
        if int(status) != 0:
            raise MemoryError(f"the driver pins no {size / 2**20:,.0f} MiB of main memory: {status}")
        weakref.finalize(memory, driver.cudaHostUnregister, memory.data_ptr())
    return memory
