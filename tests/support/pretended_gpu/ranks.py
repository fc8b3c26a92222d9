"""Several ranks with one pretended GPU each: collectives run over gloo, DDP's buckets are on the GPU."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.pretended_gpu.streams import current, gpu


def over_gloo(native: Callable[..., Any]) -> Callable[..., Any]:
    """init_process_group with gloo in place of NCCL."""

    def start(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return native("gloo", *args, **kwargs)

    return start


def allocating(native: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose tensors are allocated by C++ for parameters on the GPU: the buckets of DDP's reducer."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with gpu().allocating():
            return native(*args, **kwargs)

    return call


def patch_ranks(stack: ExitStack) -> None:
    """Let NCCL be gloo, inside a stack's block."""
    for owner, name, value in (
        (dist, "init_process_group", over_gloo(dist.init_process_group)),
        (dist, "is_nccl_available", lambda: True),
        (torch.accelerator, "current_stream", current),
        (torch.cuda, "device_count", lambda: 2),
        (DistributedDataParallel, "_ddp_init_helper", allocating(DistributedDataParallel._ddp_init_helper)),
        (DistributedDataParallel, "_pre_forward", allocating(DistributedDataParallel._pre_forward)),
    ):
        stack.enter_context(patch.object(owner, name, value))
