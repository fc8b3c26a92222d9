"""Tensors that backward makes again from less: a norm's output from its input, a gated product from its factors.

A row-wise function of tensors that are saved anyway need not have its result saved. `rowwise_checkpoint` runs such a
function and saves its sources; a reader of the result in backward (an adapter's branch) asks `origin_of` for them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Make = Callable[..., Tensor]
CACHED_BYTES = 4 * 2**20  # a CPU works on so much of a tensor at a time: what comes in between stays in its cache
ATTRIBUTE = "made_from"


class Rematerialization:
    """How a tensor was made. It is made once for all who read it in backward, and dropped after the last one."""

    def __init__(self, make: Make) -> None:
        self.make, self.readers, self.made = make, 0, None

    make: Make
    readers: int
    made: Tensor | None

    def again(self, sources: Sequence[Tensor]) -> Tensor:
        """The tensor, bit for bit as it was in forward."""
        with torch.no_grad():
            made = _in_chunks(self.make, sources) if self.made is None else self.made
        self.readers -= 1
        self.made = made if self.readers > 0 else None
        return made


class Origin(NamedTuple):
    """What a tensor can be made from again. The sources stand beside the replay, which must not keep them alive."""

    replay: Rematerialization
    sources: tuple[Tensor, ...]


def rowwise_checkpoint(make: Make, *sources: Tensor, trained: tuple[Tensor, ...] = ()) -> Tensor:
    """make(*sources, *trained), which works on each row (last dimension) of the sources alone; keeps the sources only.

    Sources [..., any] of one leading shape; `make` runs again, row by row the same, in backward. `trained` are the
    parameters that learn: they do not change until backward is done.
    """
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in (*sources, *trained))
    if not wanted or torch.compiler.is_compiling():  # a compiler finds out by itself what to make again
        return make(*sources, *trained)
    made: Tensor = _RowWise.apply(make, len(trained), *trained, *sources)
    setattr(made, ATTRIBUTE, Origin(Rematerialization(lambda *rows: make(*rows, *trained)), sources))
    return made


def origin_of(tensor: Tensor) -> Origin | None:
    """How `tensor` was made, if it need not be kept; one more reader in backward is counted on."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    origin: Origin | None = getattr(tensor, ATTRIBUTE, None)
    if origin is not None:
        origin.replay.readers += 1
    return origin


class _RowWise(torch.autograd.Function):
    """A row-wise function whose steps are made again in backward, on a CPU a cacheful of rows at a time."""

    @staticmethod
    def forward(ctx: Any, make: Make, learn: int, *tensors: Tensor) -> Tensor:
        """make(*sources, *trained); of the tensors the first `learn` are the trained ones."""
        ctx.make, ctx.learn = make, learn
        ctx.save_for_backward(*tensors)
        trained = tensors[:learn]
        return _in_chunks(lambda *rows: make(*rows, *trained), tensors[learn:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of what wants one; those of trained tensors are sums over the rows."""
        saved = ctx.saved_tensors  # asked for once: a recomputed block gives them a single time
        trained = [each.detach().requires_grad_() for each in saved[: ctx.learn]]
        wanted, sources = ctx.needs_input_grad[2 + ctx.learn :], [_rows(each) for each in saved[ctx.learn :]]
        found = [torch.empty_like(s) if w else None for s, w in zip(sources, wanted, strict=True)]
        sums, grad = [torch.zeros_like(each) for each in trained], _rows(grads[0])
        for part in _parts(sources):
            pieces = [s[part].detach().requires_grad_(w) for s, w in zip(sources, wanted, strict=True)]
            with torch.enable_grad():
                made = ctx.make(*pieces, *trained)
            inputs = [*trained, *(piece for piece in pieces if piece.requires_grad)]
            slopes = iter(torch.autograd.grad(made, inputs, grad[part]))
            for total in sums:
                total += next(slopes)
            for each in found:
                if each is not None:
                    each[part] = next(slopes)
        shaped = (None if g is None else g.view(s.shape) for g, s in zip(found, saved[ctx.learn :], strict=True))
        return None, None, *sums, *shaped


def _in_chunks(make: Make, sources: Sequence[Tensor]) -> Tensor:
    """make(*sources) without ever holding its steps for all rows, where that pays."""
    rows = [_rows(source) for source in sources]
    parts = list(_parts(rows))
    if len(parts) == 1:
        return make(*sources)
    first = make(*(row[parts[0]] for row in rows))
    made = first.new_empty(len(rows[0]), first.shape[-1])
    made[parts[0]] = first
    for part in parts[1:]:
        made[part] = make(*(row[part] for row in rows))
    return made.view(*sources[0].shape[:-1], first.shape[-1])


def _parts(rows: Sequence[Tensor]) -> Iterator[slice]:
    """All rows at once; on a CPU as many as fit its cache in float32."""
    total, width = len(rows[0]), max(row.shape[-1] for row in rows)
    step = max(1, CACHED_BYTES // (4 * width)) if rows[0].device.type == "cpu" else max(1, total)
    yield from (slice(start, start + step) for start in range(0, max(1, total), step))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
