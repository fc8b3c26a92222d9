"""A pretended GPU: qlora runs with device `cuda` on a CPU build of torch, and what would go wrong on a GPU is seen.

Seen: operators on tensors of two devices; copies that a computation overtakes, and the other way round; memory freed
under a copy; every wait of the host, with the line that causes it; kernel launches; copies from pageable memory. Not
seen: what a CUDA kernel itself demands, time, the driver. A compiled layer runs uncompiled under a dispatch mode.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from support.pretended_gpu.counters import Counters, GpuError
from support.pretended_gpu.dispatch import PretendedGpu
from support.pretended_gpu.libraries import FUNCTIONS, OWNER, forget_devices
from support.pretended_gpu.ranks import patch_ranks
from support.pretended_gpu.storages import on_gpu
from support.pretended_gpu.tensor_methods import METHODS, by_device, creating, one_hot
from support.pretended_gpu.torch_cuda import CAPABILITY, TOTAL_BYTES, Generator, functions

GROUP = "_group_tensors_by_device_and_dtype"  # in torch._C
__all__ = ["Counters", "GpuError", "PretendedGpu", "on_gpu", "pretended_gpu"]


@contextmanager
def pretended_gpu(
    capability: tuple[int, int] = CAPABILITY, free_bytes: int = TOTAL_BYTES, several: bool = False, **options: Any
) -> Iterator[PretendedGpu]:
    """Inside the block torch has one GPU. `several`: so have other ranks. `options`: of PretendedGpu."""
    gpu = PretendedGpu(**options)
    replacements: list[tuple[Any, str, Any]] = [
        *((torch.Tensor, name, value) for name, value in METHODS.items()),
        *((torch.cuda, name, value) for name, value in functions(gpu, capability, free_bytes).items()),
        *((OWNER, name, value) for name, value in FUNCTIONS.items()),
        (torch, "Generator", Generator),
        (torch._C, GROUP, by_device(getattr(torch._C, GROUP))),
        *((torch, name, creating(getattr(torch, name))) for name in ("tensor", "as_tensor", "asarray")),
        (torch.nn.functional, "one_hot", one_hot),
    ]
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value))
        if several:
            patch_ranks(stack)
        forget_devices()
        stack.callback(forget_devices)
        stack.enter_context(gpu)
        yield gpu
