"""Gradient check: within the first steps every trainable tensor must have had a gradient that is not zero."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora.errors import QloraError

# B starts at zero, so A has no gradient in the first step; two more steps are allowed for sequences with few tokens.
STEPS = 4


def watch_gradients(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check the gradients of the first STEPS optimizer steps.

    The step raises QloraError, with the names, if a tensor has had no gradient by then: it would never be trained.
    """
    pending, steps = dict(parameters), 0

    def check(*_: Any) -> None:
        nonlocal steps
        steps += 1
        for name in _with_gradient(pending):
            del pending[name]
        if pending and steps >= STEPS:
            raise QloraError(
                f"no gradient reaches {len(pending)} of {len(parameters)} trainable tensors in {steps} steps: "
                f"{', '.join(sorted(pending)[:3])}. They would never be trained; none of these steps was saved. "
                "Leave these layers out of adapter.targets, and please report the model."
            )
        if not pending:
            hook.remove()

    hook = optimizer.register_step_pre_hook(check)


def _with_gradient(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of the parameters whose gradient is not zero; one transfer from the device for all of them."""
    gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    if not gradients:
        return []
    counts = torch.stack([_local(gradient).count_nonzero() for gradient in gradients.values()]).tolist()
    return [name for name, count in zip(gradients, counts, strict=True) if count]


def _local(value: torch.Tensor) -> torch.Tensor:
    """The local shard of a sharded tensor; any other tensor unchanged."""
    return value.to_local() if hasattr(value, "to_local") else value
