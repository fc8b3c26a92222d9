"""Does every trainable tensor learn? Within the first steps each must have had a gradient that is not zero."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora.errors import QloraError

# B starts at zero, so A has no gradient in the first step; a few more are allowed for rows that say little.
STEPS = 4


def watch_gradients(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
    """Look at the gradients of the first STEPS steps that are taken, then no more.

    The step raises QloraError, with the names, if some tensor has had no gradient by then: it would never learn.
    """
    waiting, taken = dict(named), 0

    def look(*_: Any) -> None:
        nonlocal taken
        taken += 1
        for name in _moving(waiting):
            del waiting[name]
        if waiting and taken >= STEPS:
            raise QloraError(
                f"no gradient reaches {len(waiting)} of {len(named)} trainable tensors in {taken} steps: "
                f"{', '.join(sorted(waiting)[:3])}. They would never learn; nothing of these steps was kept. "
                "Leave these layers out of adapter.targets, and tell us which model this is."
            )
        if not waiting:
            hook.remove()

    hook = optimizer.register_step_pre_hook(look)


def _moving(named: Mapping[str, nn.Parameter]) -> list[str]:
    """The names whose gradient is not zero; one transfer from the device for all of them."""
    there = {name: value.grad for name, value in named.items() if value.grad is not None}
    if not there:
        return []
    found = torch.stack([_local(gradient).count_nonzero() for gradient in there.values()]).tolist()
    return [name for name, count in zip(there, found, strict=True) if count]


def _local(value: torch.Tensor) -> torch.Tensor:
    """The share of this process in a tensor that is spread over several."""
    return value.to_local() if hasattr(value, "to_local") else value
