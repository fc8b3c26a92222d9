"""The optimisers, LoRA+ groups, and their state as plain tensors.  Door: bitsandbytes.optim.

Adapters are float32, so every optimiser here updates master weights.  Paged state lives in memory that the driver can
move to the host; on a CPU bitsandbytes keeps it unpaged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn

from qlora.errors import QloraError
from qlora.training.offloaded_adamw import OffloadedAdamw

CONSTANTS = ("qmap1", "qmap2")  # code tables that bitsandbytes makes again by itself
Groups = Sequence[dict[str, Any]]


class Adamw:
    """AdamW (arXiv:1711.05101), PyTorch's fused kernel."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """An optimiser over `groups`, each with `params` and `lr`."""
        return torch.optim.AdamW(list(groups), betas=betas, weight_decay=weight_decay, fused=True)


class OffloadedAdamwKind:
    """AdamW whose moments wait in main memory, for drivers that do not page (hosted.py)."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """An optimiser over `groups`, each with `params` and `lr`."""
        return OffloadedAdamw(groups, betas, weight_decay)


class Adamw8bit:
    """AdamW with moments in 8 bits (arXiv:2110.02861); tensors below 4,096 values keep 32."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """An optimiser over `groups`, each with `params` and `lr`."""
        return AdamW8bit(list(groups), betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


class PagedAdamw32bit:
    """AdamW whose moments the driver can move to host memory when the card runs full (QLoRA, section 3)."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """An optimiser over `groups`, each with `params` and `lr`."""
        return PagedAdamW32bit(list(groups), betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


class PagedAdamw8bit:
    """Both: moments in 8 bits, and paged."""

    @staticmethod
    def build(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """An optimiser over `groups`, each with `params` and `lr`."""
        return PagedAdamW8bit(list(groups), betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


def groups(named: Mapping[str, nn.Parameter], learning_rate: float, loraplus_ratio: float | None) -> Groups:
    """Parameter groups with their peak rate; with LoRA+ (arXiv:2402.12354) every B learns that much faster."""
    if loraplus_ratio is None:
        return [{"params": list(named.values()), "lr": learning_rate, "peak": learning_rate}]
    fast = [parameter for name, parameter in named.items() if name.endswith(".B")]
    slow = [parameter for name, parameter in named.items() if not name.endswith(".B")]
    rates = ((slow, learning_rate), (fast, learning_rate * loraplus_ratio))
    return [{"params": members, "lr": rate, "peak": rate} for members, rate in rates]


def set_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Let every group learn at `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def state_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state as `{parameter}/{entry}` -> tensor on the CPU, readable without bitsandbytes."""
    return {
        f"{name}/{entry}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for name, parameter in named.items()
        for entry, value in optimizer.state[parameter].items()
        if entry not in CONSTANTS
    }


def load_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put saved state back, bit for bit; state that was paged is made anew as paged, then filled.

    QloraError if an entry has no place or another shape: then it belongs to another optimiser.
    """
    entries: dict[str, dict[str, Tensor]] = {name: {} for name in named}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in entries:
            raise QloraError(f"optimizer state: {name!r} is no trainable parameter of this run.")
        entries[name][entry] = value
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = next(name for name, candidate in named.items() if candidate is parameter)
            if entries[name]:
                _restore(optimizer, (group, parameter, group_index, index), entries[name])


def _restore(optimizer: torch.optim.Optimizer, place: tuple[Any, ...], saved: Mapping[str, Tensor]) -> None:
    parameter = place[1]
    if isinstance(optimizer, Optimizer8bit):
        optimizer.init_state(*place)
        state = optimizer.state[parameter]
    elif isinstance(optimizer, OffloadedAdamw):
        state = optimizer.state[parameter] = optimizer.new_state(parameter)
    else:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state = optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    for entry, value in saved.items():
        _fill(state, entry, value)


def _fill(state: dict[str, Any], entry: str, value: Tensor) -> None:
    if entry not in state or (isinstance(state[entry], Tensor) and state[entry].shape != value.shape):
        raise QloraError(f"optimizer state: {entry!r} {list(value.shape)} does not belong to this optimiser.")
    if isinstance(state[entry], Tensor):
        state[entry].copy_(value)
    else:
        state[entry] = value.item()
