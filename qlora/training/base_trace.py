"""Outputs of a model's layers, its logits and its loss on a few fixed tokens, for the start-up check."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.data.types import Layout
from qlora.memory.activation_recompute import decoder_layers
from qlora.model.class_head import accepted
from qlora.model.lm_head import Head
from qlora.quant.linear import FrozenLinear
from qlora.training.loss import TokenLoss

SEQUENCES, TOKENS = 2, 12
LAYOUT = Layout(((0,),) * SEQUENCES, (TOKENS,) * SEQUENCES)
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a layer or an expert in a path
COMMON = 8  # first tokens that all sequences share


@dataclass
class Trace:
    """Outputs of the layers on the host in the order of their calls, float32 logits [B, T, V], mean loss."""

    layers: list[Tensor | None] = field(default_factory=list)  # None: not a tensor
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: float = 0.0
    called: set[str] = field(default_factory=set)  # paths of the frozen layers that ran


def trace_loaded(model: Any) -> Trace:
    """The loaded base, with gradients through each layer, so that it takes the kernels of training."""
    loss, trace = TokenLoss(model), Trace()
    head = loss.head
    ids = _ids(head.vocab_size).to(head.weight.device)
    positions = torch.arange(TOKENS, device=ids.device).expand(SEQUENCES, -1)

    def record(_: Any, __: Any, output: Any) -> Any:
        hidden = _hidden(output)
        trace.layers.append(None if hidden is None else hidden.detach().cpu())
        return _with_hidden(output, _needing_gradient(hidden)) if hidden is not None else output

    embedding = model.get_input_embeddings()
    frozen = {id(module): path for path, module in model.named_modules() if isinstance(module, FrozenLinear)}
    layers = [module for module in model.modules() if id(module) in frozen]
    with (
        hooks(layers, lambda layer, _, __: trace.called.add(frozen[id(layer)])),
        hooks(decoder_layers(model), record),
        hooks([embedding], lambda _, __, out: _needing_gradient(out)),
    ):
        hidden = head.hidden_states(ids, positions, LAYOUT).detach()
    with torch.no_grad():
        trace.logits = head(hidden)
        trace.loss = float(loss.of_hidden_states(hidden, ids)) / (SEQUENCES * (TOKENS - 1))
    return trace


def mark_unused(model: nn.Module, called: set[str]) -> list[str]:
    """Mark the frozen layers that never run, in no layer and in no expert; returns their last names."""
    kinds = {NUMBER.sub("*", path) for path in called}
    unused: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and NUMBER.sub("*", path) not in kinds:
            module.is_used = False
            unused.append(NUMBER.sub("", path).rstrip(".").rpartition(".")[2])
    return sorted(set(unused))


@torch.no_grad()
def run_in_training_mode(model: Any) -> None:
    """A forward in training mode, in which some classes take other ways; raises what it raises."""
    head = Head(model)
    ids = _ids(head.vocab_size).to(head.weight.device)
    positions = torch.arange(TOKENS, device=ids.device).expand(SEQUENCES, -1)
    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        model.train()
        try:
            head.hidden_states(ids, positions, LAYOUT)
        finally:
            model.eval()


@torch.no_grad()
def trace_reference(reference: Any, loaded: Trace) -> Trace:
    """The class's own model; each of its layers gets what the loaded model's layer before it gave."""
    trace = Trace()
    ids = _ids(loaded.logits.shape[-1]).to(loaded.logits.device)

    def compare(_: Any, __: Any, output: Any) -> Any:
        hidden, number = _hidden(output), len(trace.layers)
        trace.layers.append(None if hidden is None else hidden.cpu())
        forced = loaded.layers[number] if number < len(loaded.layers) else None
        if hidden is None or forced is None or forced.shape != hidden.shape:
            return output
        return _with_hidden(output, forced.to(hidden.device))

    with hooks(decoder_layers(reference), compare):
        output = reference(**accepted(type(reference).forward, input_ids=ids, use_cache=False))
    trace.logits = output.logits.float()
    trace.loss = float(F.cross_entropy(trace.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    return trace


def _ids(vocabulary: int) -> Tensor:
    """Fixed ids [B, T], equal up to COMMON, from the middle of the vocabulary, where no control tokens are expected."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 8, vocabulary // 2, (SEQUENCES, TOKENS), generator=generator)
    ids[:, :COMMON] = ids[0, :COMMON]
    return ids


@contextmanager
def hooks(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Forward hooks on modules, inside the block."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Tensor | None:
    """The hidden states in a layer's output."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _needing_gradient(hidden: Tensor) -> Tensor:
    """The same values as a new graph's start. A copy: a class may change its layers' inputs in place."""
    return hidden.detach().requires_grad_().clone()
