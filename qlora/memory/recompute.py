"""Which layers recompute their activations in backward instead of keeping them (arXiv:1604.06174)."""

from typing import Any

from torch import nn


def recompute(model: Any, layers: int | None) -> int:
    """Let the first `layers` decoder layers (None: all) recompute in backward, non-reentrant; returns how many do.

    Non-reentrant, so that frozen embeddings need no gradient and a layer's last product is not computed again.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    switchable = [module for module in model.modules() if _recomputes(module)]
    chosen = len(switchable) if layers is None else min(layers, len(switchable))
    for position, module in enumerate(switchable):
        module.gradient_checkpointing = position < chosen  # type: ignore[assignment]
    return chosen


def _recomputes(module: nn.Module) -> bool:
    """Whether transformers marks the module as a layer that can recompute."""
    return hasattr(module, "gradient_checkpointing") and hasattr(module, "_gradient_checkpointing_func")
