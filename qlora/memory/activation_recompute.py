"""The activation policy of each layer: keep, recompute in backward (arXiv:1604.06174), or offload to host memory.

Every combination gives the same gradients bit for bit: recomputed and fetched tensors equal the saved ones.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from qlora.memory.activation_offload import ActivationOffloader
from qlora.model.module_tree import decoder_of, is_decoder_layer
from qlora.model.recurrent_mixers import DocumentMixer, documents_apart, mixers_of


def recompute(model: nn.Module, layers: int | None, offloader: ActivationOffloader | None = None) -> int:
    """Recompute the first `layers` decoder layers (None: all) in backward; returns how many.

    `offloader`: what its first layers save is offloaded; of a recomputed layer that is only the input.
    Transformers marks its layers with a `gradient_checkpointing` switch, and calls the function set on the module.
    """
    modules = decoder_layers(model)
    recomputed = len(modules) if layers is None else min(layers, len(modules))
    for position, module in enumerate(modules):
        forward = partial(_recomputed, mixers_of(module)) if position < recomputed else _kept
        module._gradient_checkpointing_func = partial(_run, offloader, ref(module), position, forward)
        module.gradient_checkpointing = position < recomputed or offloader is not None
    return recomputed


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder's layers in order: the modules of transformers whose class has the checkpointing switch."""
    decoder: nn.Module = decoder_of(model)
    return [module for module in decoder.modules() if is_decoder_layer(module)]


def _run(
    offloader: ActivationOffloader | None,
    layer: "ref[nn.Module]",
    position: int,
    forward: Callable[..., Any],
    call: Any,
    *args: Any,
) -> Any:
    """One layer's forward in training; `call` is transformers' partial of it."""
    if offloader is None:
        return forward(call, *args)
    if position >= offloader.layers:
        offloader.release()
        return forward(call, *args)
    with offloader.offloaded(position, _shared(layer(), call)):
        return forward(call, *args)


def _kept(call: Any, *args: Any) -> Any:
    """A layer's forward, whose tensors are kept for backward."""
    return call(*args)


def _recomputed(mixers: Sequence[DocumentMixer], call: Any, *args: Any) -> Any:
    """A layer's forward, which runs again in backward: with the documents that its recurrent mixers have now."""
    documents = mixers[0].batches if mixers else None

    def forward(*args: Any) -> Any:
        with documents_apart(mixers, documents):
            return call(*args)

    # Non-reentrant: frozen embeddings need no gradient, and a layer's last product is not recomputed.
    return checkpoint(forward if mixers else call, *args, use_reentrant=False)


def _shared(layer: Any, call: Any) -> Iterator[Tensor]:
    """Tensors that outlive the layer's forward: its weights, and the masks and positions that all layers read."""
    tensors = (*layer.parameters(), *(value for value in tree_iter(call.keywords) if isinstance(value, Tensor)))
    yield from (tensor for tensor in tensors if not hasattr(tensor, "to_local"))  # a shard has no memory of its own
