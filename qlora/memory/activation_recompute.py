"""What each layer does with its activations: keep them, recompute them in backward (arXiv:1604.06174), or park them.

Any mix gives the same gradients bit for bit: what is recomputed or comes back from host memory is what was there.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from qlora.memory.activation_offload import ActivationOffloader


def recompute(model: nn.Module, layers: int | None, parking: ActivationOffloader | None = None) -> int:
    """Let the first `layers` decoder layers (None: all) recompute in backward; returns how many do.

    `parking`: what its own first layers keep waits in host memory; of a recomputed layer that is its input alone.
    Transformers marks its layers with a `gradient_checkpointing` switch and takes the function from beside it.
    """
    switchable = decoder_layers(model)
    chosen = len(switchable) if layers is None else min(layers, len(switchable))
    for position, module in enumerate(switchable):
        module._gradient_checkpointing_func = partial(_run, parking, position, position < chosen)
        module.gradient_checkpointing = position < chosen or parking is not None
    return chosen


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder's layers in order: those of transformers' layers that can recompute, by their class's switch."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    return [module for module in decoder.modules() if _is_layer(module)]


def _run(parking: ActivationOffloader | None, position: int, recomputes: bool, call: Any, *args: Any) -> Any:
    """One layer's forward in training; `call` is transformers' partial of it, the layer its first argument."""
    # Non-reentrant: frozen embeddings need no gradient, and a layer's last product is not computed again.
    forward = partial(checkpoint, call, use_reentrant=False) if recomputes else call
    if parking is None:
        return forward(*args)
    if position >= parking.layers:
        parking.settle()
        return forward(*args)
    with parking.parked(position, _shared(call)):
        return forward(*args)


def _shared(call: Any) -> Iterator[Tensor]:
    """Tensors that outlive the layer: its weights, and the masks and positions that all layers read."""
    yield from call.args[0].parameters()
    yield from (each for each in tree_iter(call.keywords) if isinstance(each, Tensor))


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is one of transformers' layers that can recompute: the switch stands on the class."""
    return "gradient_checkpointing" in {name for kind in type(module).__mro__ for name in vars(kind)}
