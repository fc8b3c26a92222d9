"""Rematerialization: tensors made again in backward from less, a norm's output from its input, a product from factors.

A row-wise function of tensors that are saved anyway need not have its result saved. `rowwise_checkpoint` runs such a
function and saves its sources. Who needs the result in backward (an adapter's branch) asks `origin_of` for them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.utils.owned_gradients import is_owned
from qlora.utils.row_chunks import chunk_rows

Function = Callable[..., Tensor]
ATTRIBUTE = "qlora_origin"


class Rematerialization:
    """The function of a tensor. Runs once for all readers of the tensor in backward; the last one drops it."""

    def __init__(self, function: Function) -> None:
        self.function, self.readers, self.tensor = function, 0, None

    function: Function
    readers: int
    tensor: Tensor | None

    def run(self, sources: Sequence[Tensor]) -> Tensor:
        """The tensor, bit for bit as in forward."""
        with torch.no_grad():
            tensor = self.function(*sources) if self.tensor is None else self.tensor
        self.readers -= 1
        self.tensor = tensor if self.readers > 0 else None
        return tensor


class Origin(NamedTuple):
    """What a tensor can be made from. The sources are not in the rematerialization, which must not keep them alive."""

    rematerialization: Rematerialization
    sources: tuple[Tensor, ...]


def rowwise_checkpoint(function: Function, *sources: Tensor, trained: tuple[Tensor, ...] = ()) -> Tensor:
    """function(*sources, *trained), which works on each row (last dimension) of the sources; saves the sources only.

    Sources [..., any] have one leading shape. `function` runs again in backward, row by row the same. `trained` are
    trainable parameters, which do not change until backward is done.
    """
    has_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*sources, *trained))
    if not has_grad or torch.compiler.is_compiling():  # a compiler decides on its own what to recompute
        return function(*sources, *trained)
    result: Tensor = _RowWise.apply(function, len(trained), *trained, *sources)
    return set_origin(result, lambda *saved: _in_chunks(lambda *rows: function(*rows, *trained), saved), *sources)


def set_origin(tensor: Tensor, function: Function, *sources: Tensor) -> Tensor:
    """`tensor`, whose readers may make it again as function(*sources), in every bit the same, instead of saving it."""
    setattr(tensor, ATTRIBUTE, Origin(Rematerialization(function), sources))
    return tensor


def origin_of(tensor: Tensor) -> Origin | None:
    """The origin of a tensor that need not be saved, else None; counts one more reader in backward."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    origin: Origin | None = getattr(tensor, ATTRIBUTE, None)
    if origin is not None:
        origin.rematerialization.readers += 1
    return origin


class _RowWise(torch.autograd.Function):
    """A row-wise function that is recomputed in backward, CHUNK_BYTES of rows at a time."""

    @staticmethod
    def forward(ctx: Any, function: Function, trained_count: int, *tensors: Tensor) -> Tensor:
        """function(*sources, *trained); the first `trained_count` of the tensors are the trained ones."""
        ctx.function, ctx.trained_count = function, trained_count
        ctx.save_for_backward(*tensors)
        trained = tensors[:trained_count]
        return _in_chunks(lambda *rows: function(*rows, *trained), tensors[trained_count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of sources that need one; those of trained tensors are sums over the rows."""
        saved = ctx.saved_tensors  # read once: a recomputed block returns them a single time
        count = ctx.trained_count
        trained = [tensor.detach().requires_grad_() for tensor in saved[:count]]
        needed, sources = ctx.needs_input_grad[2 + count :], [_rows(tensor) for tensor in saved[count:]]
        trained_grads, grad = [torch.zeros_like(tensor) for tensor in trained], _rows(grads[0])
        source_grads = [torch.empty_like(s) if n else None for s, n in _without_owned(sources, needed, grads[0])]
        if len(source_grads) < len(sources):  # the first one is written over the rows of `grad` that have been read
            source_grads.insert(0, grad)
        for chunk in _chunks(sources):
            leaves = [s[chunk].detach().requires_grad_(n) for s, n in zip(sources, needed, strict=True)]
            with torch.enable_grad():
                result = ctx.function(*leaves, *trained)
            inputs = [*trained, *(leaf for leaf in leaves if leaf.requires_grad)]
            chunk_grads = iter(torch.autograd.grad(result, inputs, grad[chunk]))
            for total in trained_grads:
                total += next(chunk_grads)
            for source_grad in source_grads:
                if source_grad is not None:
                    source_grad[chunk] = next(chunk_grads)
            del leaves, result, inputs, chunk_grads  # before the next chunk allocates its own
        shaped = (None if g is None else g.view(s.shape) for g, s in zip(source_grads, saved[count:], strict=True))
        return None, None, *trained_grads, *shaped


def _without_owned(sources: Sequence[Tensor], needed: Sequence[bool], grad: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The sources and whether they need a gradient, without the first one if that can be written over `grad`."""
    fits = sources[0].shape == _rows(grad).shape and sources[0].dtype == grad.dtype and grad.is_contiguous()
    reused = needed[0] and fits and is_owned(grad)
    yield from zip(sources[reused:], needed[reused:], strict=True)


def _in_chunks(function: Function, sources: Sequence[Tensor]) -> Tensor:
    """function(*sources), with the intermediate values of one chunk of rows at a time."""
    rows = [_rows(source) for source in sources]
    chunks = list(_chunks(rows))
    if len(chunks) == 1:
        return function(*sources)
    first = function(*(source[chunks[0]] for source in rows))
    result = first.new_empty(len(rows[0]), first.shape[-1])
    result[chunks[0]] = first
    for chunk in chunks[1:]:
        result[chunk] = function(*(source[chunk] for source in rows))
    return result.view(*sources[0].shape[:-1], first.shape[-1])


def _chunks(rows: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of rows: of so many that they take CHUNK_BYTES in float32."""
    total, width = len(rows[0]), max(source.shape[-1] for source in rows)
    step = chunk_rows(width, rows[0].device.type)
    yield from (slice(start, start + step) for start in range(0, max(1, total), step))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
