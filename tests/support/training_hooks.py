"""Hooks into a training run, built on torch's global hooks: tests observe and disturb runs without patching."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qlora.training.loss import TokenLoss


@contextmanager
def before_update(action: Callable[[int], None]) -> Iterator[None]:
    """Inside the block `action` runs before every optimizer update of this process, with its number (from 1)."""
    numbers = itertools.count(1)

    def hook(*_: Any) -> None:
        action(next(numbers))

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def before_forward(action: Callable[[TokenLoss], None]) -> Iterator[None]:
    """Inside the block `action` runs before every forward of a training job's model."""

    def hook(module: nn.Module, inputs: object) -> None:
        if isinstance(module, TokenLoss):
            action(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def before_first_forward(action: Callable[[TokenLoss], None]) -> Iterator[None]:
    """Inside the block `action` runs once for every training job's model, before its first forward."""
    known: WeakSet[TokenLoss] = WeakSet()

    def once(model: TokenLoss) -> None:
        if model not in known:
            known.add(model)
            action(model)

    with before_forward(once):
        yield


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
