"""Optimizers, LoRA+ parameter groups, and optimizer state as plain tensors. The module that imports bitsandbytes.optim.

Trainable weights are float32, so optimizers update them directly. Paged state is in memory that the driver can move to
the host; on a CPU bitsandbytes keeps it unpaged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn

from qlora.errors import QloraError
from qlora.training.offloaded_adamw import OffloadedStateAdamW

CONSTANTS = ("qmap1", "qmap2")  # code tables, which bitsandbytes creates again
Groups = Sequence[dict[str, Any]]

OTHER_STATE = "Resume from a checkpoint of this recipe, or start a new run with train.resume=never."


class Adamw:
    """AdamW (arXiv:1711.05101), PyTorch's fused kernel."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of `groups`, each with `params` and `lr`."""
        return torch.optim.AdamW(list(groups), betas=betas, weight_decay=weight_decay, fused=True)


class OffloadedAdamw:
    """AdamW with moments in host memory, for drivers that do not page (offloaded_adamw.py)."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of `groups`, each with `params` and `lr`."""
        return OffloadedStateAdamW(groups, betas, weight_decay)


class Adamw8bit:
    """AdamW with moments in 8 bits (arXiv:2110.02861); tensors below 4,096 values keep 32."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of `groups`, each with `params` and `lr`."""
        return AdamW8bit(list(groups), betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


class PagedAdamw32bit:
    """AdamW with moments that the driver moves to host memory when the GPU is full (QLoRA, section 3)."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of `groups`, each with `params` and `lr`."""
        return PagedAdamW32bit(list(groups), betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


class PagedAdamw8bit:
    """AdamW with paged moments in 8 bits."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of `groups`, each with `params` and `lr`."""
        return PagedAdamW8bit(list(groups), betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, loraplus_ratio: float | None
) -> Groups:
    """Parameter groups with their peak learning rate; with LoRA+ (arXiv:2402.12354) that of every B is multiplied."""
    if loraplus_ratio is None:
        return [{"params": list(parameters.values()), "lr": learning_rate, "peak": learning_rate}]
    others = [parameter for name, parameter in parameters.items() if not name.endswith(".B")]
    b_matrices = [parameter for name, parameter in parameters.items() if name.endswith(".B")]
    rates = ((others, learning_rate), (b_matrices, learning_rate * loraplus_ratio))
    return [{"params": members, "lr": rate, "peak": rate} for members, rate in rates]


def scale_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer state as `{parameter}/{entry}` -> tensor on the CPU, readable without bitsandbytes."""
    return {
        f"{name}/{entry}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for name, parameter in parameters.items()
        for entry, value in optimizer.state[parameter].items()
        if entry not in CONSTANTS
    }


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore saved state, bit for bit; paged state is allocated as paged, then filled.

    QloraError if the optimizer has no such entry or one of another shape: the state is another optimizer's.
    """
    entries: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in entries:
            raise QloraError(f"optimizer state: {name!r} is not a trainable parameter of this run. {OTHER_STATE}")
        entries[name][entry] = value
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = next(name for name, candidate in parameters.items() if candidate is parameter)
            if entries[name]:
                _restore(optimizer, (group, parameter, group_index, index), entries[name])


def _restore(optimizer: torch.optim.Optimizer, key: tuple[Any, ...], entries: Mapping[str, Tensor]) -> None:
    """`key`: group, parameter, group index and parameter index, as bitsandbytes' init_state takes them."""
    parameter = key[1]
    if isinstance(optimizer, Optimizer8bit):
        optimizer.init_state(*key)
        state = optimizer.state[parameter]
    elif isinstance(optimizer, OffloadedStateAdamW):
        state = optimizer.state[parameter] = optimizer.new_state(parameter)
    else:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state = optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),  # the fused kernel reads it through a raw pointer
            **moments,
        }
    for entry, value in entries.items():
        _fill(state, entry, value)


def _fill(state: dict[str, Any], entry: str, value: Tensor) -> None:
    if entry not in state or (isinstance(state[entry], Tensor) and state[entry].shape != value.shape):
        raise QloraError(
            f"optimizer state: {entry!r} {list(value.shape)} does not belong to this optimizer. {OTHER_STATE}"
        )
    if isinstance(state[entry], Tensor):
        state[entry].copy_(value)
    else:
        state[entry] = value.item()
