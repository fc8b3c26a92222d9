"""Which layers recompute their activations in backward instead of keeping them (arXiv:1604.06174)."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

# Non-reentrant: frozen embeddings need no gradient, and a layer's last product is not computed again.
RECOMPUTED = partial(checkpoint, use_reentrant=False)


def recompute(model: nn.Module, layers: int | None) -> int:
    """Let the first `layers` decoder layers (None: all) recompute in backward; returns how many do.

    Transformers marks its layers with a `gradient_checkpointing` switch and takes the function from beside it.
    """
    switchable: list[Any] = layers_of_model(model)
    chosen = len(switchable) if layers is None else min(layers, len(switchable))
    for position, module in enumerate(switchable):
        module._gradient_checkpointing_func = RECOMPUTED
        module.gradient_checkpointing = position < chosen
    return chosen


def layers_of_model(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in their order."""
    return [module for module in model.modules() if _is_layer(module)]


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is one of transformers' layers that can recompute: the switch stands on the class."""
    return "gradient_checkpointing" in {name for kind in type(module).__mro__ for name in vars(kind)}
