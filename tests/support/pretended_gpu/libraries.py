"""Pieces of bitsandbytes that need its CUDA library, and what accelerate remembers of the machine's devices."""

from typing import Any

import bitsandbytes.functional as bnb
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from support.pretended_gpu.storages import host_state


def paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """Managed memory: torch takes it for host memory, kernels of the GPU use it too."""
    tensor = torch.zeros(*shape, dtype=dtype)
    host_state(tensor).managed = True
    tensor.is_paged, tensor.page_deviceid = True, 0  # type: ignore[attr-defined]
    return tensor


FUNCTIONS: dict[str, Any] = {
    "get_paged": paged,
    "prefetch_tensor": lambda *_, **__: None,
    "fill": lambda tensor, value, **_: tensor.fill_(value),
}
OWNER = bnb


def forget_devices() -> None:
    """Let accelerate look for devices again."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
