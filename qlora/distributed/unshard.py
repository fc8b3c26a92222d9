"""A module whose parameters other processes hold shares of, whole for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside the block every parameter of `module` itself is there; one that is not sharded always is."""
    sharded: Any = module if hasattr(module, "unshard") else None
    if sharded is not None:
        sharded.unshard()
    try:
        yield
    finally:
        if sharded is not None:
            sharded.reshard()
