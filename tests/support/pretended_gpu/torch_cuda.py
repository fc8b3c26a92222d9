"""torch.cuda of the pretended GPU: one device of compute capability 8.9 with 24 GiB, by name of the function."""

from types import SimpleNamespace
from typing import Any

import torch

from support.pretended_gpu.dispatch import PretendedGpu
from support.pretended_gpu.storages import is_gpu, memory
from support.pretended_gpu.streams import Marker, Stream, current, stream_context

NAME, CAPABILITY, TOTAL_BYTES = "Pretended GPU", (8, 9), 24 * 2**30
PROPERTIES = SimpleNamespace(
    name=NAME, major=8, minor=9, total_memory=TOTAL_BYTES, multi_processor_count=128, uuid="0", warp_size=32,
    max_threads_per_multi_processor=1536, gcnArchName="",
)  # fmt: skip


class Generator(torch._C.Generator):
    """A random generator that knows its device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        """Random numbers are the CPU's."""
        return super().__new__(cls, "cpu")  # type: ignore[no-any-return]

    def __init__(self, device: Any = "cpu") -> None:
        self.is_on_gpu = is_gpu(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that the generator was opened for."""
        return torch.device("cuda", 0) if self.is_on_gpu else torch.device("cpu")


def _reset_peak(*_: Any) -> None:
    memory.peak = memory.allocated


def functions(gpu: PretendedGpu, capability: tuple[int, int], free_bytes: int) -> dict[str, Any]:
    """What replaces functions and classes of torch.cuda."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: False,  # no random state of the GPU to save
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: gpu.device.index,
        "set_device": lambda device: None,
        "synchronize": gpu.synchronize,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: PROPERTIES,
        "mem_get_info": lambda *_: (free_bytes, TOTAL_BYTES),
        "memory_allocated": lambda *_: memory.allocated,
        "max_memory_allocated": lambda *_: memory.peak,
        "reset_peak_memory_stats": _reset_peak,
        "cudart": lambda: gpu.pinned,
        "Stream": Stream,
        "Event": Marker,
        "stream": stream_context,
        "current_stream": current,
        "default_stream": lambda *_: gpu.current[0],
    }
