"""act(gate) * up of a gated MLP: the reference in torch, and one kernel each way that saves gate and up.

    h = a(g) u,  dg = dh u a'(g),  du = dh a(g)     a: silu (SwiGLU), gelu by tanh or by erf (GeGLU)

Every result is rounded where torch rounds it.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.model.kernels.kernel_choice import is_better, probe_rows, random_inputs
from qlora.model.kernels.operators import contiguous_rows, register
from qlora.utils.owned_gradients import is_owned
from qlora.utils.rematerialize import set_origin

# In the order of the kernel's numbers; the gradient is that of g from a(g)'s.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, partial(F.gelu, approximate="tanh"), F.gelu)
GRADIENTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.ops.aten.silu_backward.default,
    partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
    torch.ops.aten.gelu_backward.default,
)

_kinds: dict[tuple[Any, ...], int | None] = {}  # activation -> its number


def reference(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """act(gate) * up, elementwise."""
    return ACTIVATIONS[act](gate) * up


def reference_gradients(grad: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return GRADIENTS[act](grad * up, gate), grad * ACTIVATIONS[act](gate)


def kind_for(activation: nn.Module, gate: Tensor) -> int | None:
    """The number of an activation whose kernel is chosen for tensors like `gate`; None: run torch's operators."""
    if not gate.is_cuda or torch.compiler.is_compiling() or not gate.numel():
        return None
    kind = kind_of(activation, gate.dtype)
    return kind if kind is not None and _is_chosen(gate.device, gate.dtype, gate.shape[-1], kind) else None


@torch.no_grad()
def kind_of(activation: nn.Module, dtype: torch.dtype) -> int | None:
    """The first activation of the kernel that gives the module's bits for random numbers, on the CPU."""
    key = (repr(activation), dtype)
    if key not in _kinds and not list(activation.parameters()):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
        expected = activation(x)
        _kinds[key] = next((i for i, act in enumerate(ACTIVATIONS) if torch.equal(act(x), expected)), None)
    return _kinds.get(key)


def gated_product(act: int, *sources: Tensor) -> Tensor:
    """act(gate) * up [..., I] by its kernel, of gate and up [..., I], or of one [..., 2 I] whose halves they are.

    A reader of its result in backward may have it made again from the sources.
    """
    if not (torch.is_grad_enabled() and any(source.requires_grad for source in sources)):
        return _kernel(act, *sources)
    result: Tensor = _GatedProduct.apply(act, *sources)
    return set_origin(result, partial(_kernel, act), *sources)


@cache
def _is_chosen(device: torch.device, dtype: torch.dtype, width: int, act: int) -> bool:
    inputs = random_inputs([(probe_rows(width, dtype), width)] * 2, device, dtype)
    name = f"gated product ({('silu', 'gelu by tanh', 'gelu')[act]})"
    return is_better(name, partial(gated_product, act), partial(reference, act=act), inputs)


class _GatedProduct(torch.autograd.Function):
    """One kernel each way; saves its sources."""

    @staticmethod
    def forward(ctx: Any, act: int, *sources: Tensor) -> Tensor:
        """Gate and up [..., I], or both as halves [..., 2 I] -> [..., I]."""
        ctx.act = act
        ctx.save_for_backward(*sources)
        return _kernel(act, *sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the sources; gate's is written over the result's where this is its only reader."""
        sources = ctx.saved_tensors
        gate, up = _gate_and_up(sources)
        grad = contiguous_rows(grads[0])
        if len(sources) == 1:
            outs = [torch.empty_like(contiguous_rows(sources[0]))]
        else:
            owned = is_owned(grads[0]) and grad.is_contiguous() and grad.dtype == gate.dtype
            outs = [grad if owned else torch.empty_like(gate), torch.empty_like(up)]
        torch.ops.qlora.gated_product_backward.default(grad, gate, up, ctx.act, *_gate_and_up(outs))
        return None, *(out.view(source.shape) for out, source in zip(outs, sources, strict=True))


def _gate_and_up(sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both as [N, I] with contiguous rows."""
    rows = [contiguous_rows(source) for source in sources]
    gate, up = rows[0].chunk(2, dim=-1) if len(rows) == 1 else rows
    return gate, up


def _kernel(act: int, *sources: Tensor) -> Tensor:
    gate, up = _gate_and_up(sources)
    result: Tensor = torch.ops.qlora.gated_product.default(gate, up, act)
    return result.view(*sources[0].shape[:-1], gate.shape[-1])


def forward_on_cpu(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """The operator in plain torch, [N, I]."""
    return reference(gate, up, act).contiguous()


def backward_on_cpu(grad: Tensor, gate: Tensor, up: Tensor, act: int, gate_out: Tensor, up_out: Tensor) -> None:
    """The gradient's operator in plain torch; fills both outs, the first of which may be `grad`."""
    of_gate, of_up = reference_gradients(grad, gate, up, act)
    gate_out.copy_(of_gate)
    up_out.copy_(of_up)


def _forward_on_gpu(gate: Tensor, up: Tensor, act: int) -> Tensor:
    from qlora.model.kernels import product_kernel  # Triton is not installed everywhere

    result = _empty(gate, up, act)
    product_kernel.forward(gate, up, act, result)
    return result


def _backward_on_gpu(grad: Tensor, gate: Tensor, up: Tensor, act: int, gate_out: Tensor, up_out: Tensor) -> None:
    from qlora.model.kernels import product_kernel

    product_kernel.backward(grad, gate, up, act, (gate_out, up_out))


def _empty(gate: Tensor, up: Tensor, act: int) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


register("gated_product", "(Tensor gate, Tensor up, int act) -> Tensor", forward_on_cpu, _forward_on_gpu, _empty)
register(
    "gated_product_backward",
    "(Tensor grad, Tensor gate, Tensor up, int act, Tensor(a!) gate_out, Tensor(b!) up_out) -> ()",
    backward_on_cpu, _backward_on_gpu,
)  # fmt: skip
