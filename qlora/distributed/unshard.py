"""Temporary all-gather of one module's sharded parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Inside the block, all values of the module's own parameters are on this rank; no effect if it is not sharded."""
    fsdp_module: Any = module if hasattr(module, "unshard") else None
    if fsdp_module is not None:
        fsdp_module.unshard()
    try:
        yield
    finally:
        if fsdp_module is not None:
            fsdp_module.reshard()
