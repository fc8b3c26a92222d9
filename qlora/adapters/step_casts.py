"""Casts of A and B to the compute dtype, made once in an optimizer step instead of in every forward and backward.

A step does not change its adapters, so all of its micro-batches, and what they recompute, read the same casts. Outside
of a step, and inside torch.compile, nothing is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Casts = tuple[Tensor, ...]

_kept: dict[tuple[Any, ...], Casts] | None = None  # None: outside of a step


@contextmanager
def casts_kept(device: torch.device) -> Iterator[None]:
    """A step, in which no A and B change. Casts are kept on a GPU; on a CPU they take more memory than time."""
    global _kept
    before, _kept = _kept, {} if device.type == "cuda" else None
    try:
        yield
    finally:
        _kept = before


@torch.no_grad()
def casts_of(key: tuple[Any, ...], make: Callable[[], Casts]) -> Casts:
    """The casts of a layer or group, made by `make` at their first use in a step. `key`: what they are made for."""
    if _kept is None or torch.compiler.is_compiling():
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]
