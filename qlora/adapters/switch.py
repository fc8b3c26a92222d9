"""Adapters on and off, without touching a number."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qlora.adapters.inject import adapted


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` is its base."""
    layers = [layer for layer in adapted(model).values() if layer.active]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
