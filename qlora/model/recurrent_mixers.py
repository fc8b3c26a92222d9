"""Recurrent and convolutional mixers whose documents see only themselves, on any device.

Mamba, Gated DeltaNet, short convolutions and their likes carry a state from token to token and take no mask: in a
packed sequence each document would see those before it. They are causal, so that padding on the right changes
nothing: here the documents of a micro-batch run as rows of their own (document_batches.py), through the class's own
forward, and are joined again. With one document a sequence nothing changes.

A mixer is recognized by what it holds. One that is not recognized is caught by the packing probe of every start.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qlora.model.document_batches import DocumentBatches
from qlora.model.module_tree import decoder_of, is_decoder_layer, set_by_path

PREFIX = "Document"  # of the classes' names
# Names of parameters, buffers and children of a recurrence.
STATES = frozenset({"A_log", "dt_bias", "time_decay", "slope_rate", "recurrent_param", "mlstm_backend"})
# Of a forward that keeps a state.
CACHES = frozenset({"cache", "use_cache", "cache_params", "past_key_values", "state"})
# Of kernels that keep documents apart themselves; torch's fallbacks do not take them.
BOUNDARIES = frozenset({"documents", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


class DocumentMixer(nn.Module):
    """The forward of a mixer's class, document by document; an instance of a subclass of that class."""

    batches: DocumentBatches | None = None  # of the micro-batch; None: each sequence is one document

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class's forward returns; the first argument are hidden states [B, T, I]."""
        kwargs = {name: value for name, value in kwargs.items() if name not in BOUNDARIES}
        # Its one use in these classes is a fused kernel that reads the matrices themselves.
        training, self.training = self.training, False
        try:
            if self.batches is None:
                return super().forward(*args, **kwargs)
            return _by_document(super().forward, self.batches, (args, kwargs))
        finally:
            self.training = training


def _by_document(forward: Callable[..., Any], batches: DocumentBatches, arguments: tuple[Any, Any]) -> Any:
    leaves, form = tree_flatten(arguments)
    cuts = [batches.cut(leaf) if _has_tokens(leaf, batches.shape) else [leaf] * len(batches.tokens) for leaf in leaves]
    outputs = []
    for own in zip(*cuts, strict=True):
        args, kwargs = tree_unflatten(list(own), form)
        outputs.append(tree_flatten(forward(*args, **kwargs)))
    joined = [_joined(batches, values) for values in zip(*(values for values, _ in outputs), strict=True)]
    return tree_unflatten(joined, outputs[0][1])


def _joined(batches: DocumentBatches, values: tuple[Any, ...]) -> Any:
    """One of the outputs of all batches: [B, T, ...], or what is not of tokens, such as a state that nothing uses."""
    ours = [_has_tokens(value, tokens.shape) for value, tokens in zip(values, batches.tokens, strict=True)]
    return batches.join(values) if all(ours) else values[0]


def _has_tokens(value: Any, shape: Sequence[int]) -> bool:
    """Whether a value is [B or 1, T, ...]."""
    return (
        isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] in (1, shape[0]) and value.shape[1] == shape[1]
    )


def isolate_recurrent_mixers(model: nn.Module) -> int:
    """Replace every recurrent mixer by one that keeps documents apart; returns how many. No path changes."""
    paths = recurrent_mixers(model)
    for path in paths:
        original: Any = model.get_submodule(path)
        if isinstance(original, DocumentMixer):
            continue
        mixer, kind = copy.copy(original), type(original)  # a shallow copy: the same parameters and children
        mixer.__class__ = type(f"{PREFIX}{kind.__name__}", (DocumentMixer, kind), {"__module__": __name__})
        set_by_path(model, path, mixer)
    return len(paths)


def recurrent_mixers(model: nn.Module) -> list[str]:
    """Paths of the recurrent mixers of a decoder."""
    decoder: nn.Module = decoder_of(model)
    inside = {id(module) for module in decoder.modules()}
    paths: dict[int, str] = {}
    for holder, module in model.named_modules():
        if not (id(module) in inside and _holds_state(module)):
            continue
        path = holder
        while path and not _keeps_cache(type(model.get_submodule(path))):  # type: ignore[arg-type]
            path = path.rpartition(".")[0]
        mixer = model.get_submodule(path)
        if id(mixer) in inside and not any(is_decoder_layer(part) for part in mixer.modules()):
            paths[id(mixer)] = path
    return list(paths.values())


def _holds_state(module: nn.Module) -> bool:
    """Whether a module is part of a recurrence: it has a depthwise convolution over tokens, or a name of STATES."""
    return not STATES.isdisjoint({*module._parameters, *module._buffers, *module._modules}) or any(
        isinstance(child, nn.Conv1d) and child.groups > 1 for child in module.children()
    )


@lru_cache(maxsize=512)
def _keeps_cache(kind: Any) -> bool:
    """Whether the forward of a class takes a cache."""
    own = next(base for base in kind.__mro__ if not issubclass(base, DocumentMixer))
    return not CACHES.isdisjoint(inspect.signature(own.forward).parameters)


def mixers_of(model: nn.Module) -> list[DocumentMixer]:
    """The mixers of a model, or of a layer, that keep documents apart."""
    return [module for module in model.modules() if isinstance(module, DocumentMixer)]


@contextmanager
def documents_apart(mixers: Sequence[DocumentMixer], batches: DocumentBatches | None) -> Iterator[None]:
    """A forward of the model, or of a layer, in which `mixers` run the documents of a micro-batch apart."""
    before = [mixer.batches for mixer in mixers]
    for mixer in mixers:
        mixer.batches = batches
    try:
        yield
    finally:
        for mixer, value in zip(mixers, before, strict=True):
            mixer.batches = value
