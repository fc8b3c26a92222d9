"""RMSNorm with a frozen weight: the reference in torch, and one kernel each way that saves x and 1 / rms.

    y = n w,  n = x / sqrt(mean(x^2) + eps),  dx = (g - n mean(g n)) / sqrt(mean(x^2) + eps),  g = dy w

Sums are in float32. Families round in one of three orders, which the kernel keeps; which one a module has is measured.
"""

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.model.kernels.kernel_choice import is_better, probe_rows, random_inputs
from qlora.model.kernels.operators import contiguous_rows, register
from qlora.utils.owned_gradients import is_owned
from qlora.utils.rematerialize import set_origin

ROUND_FIRST, ROUND_LAST, ADD_ONE = range(3)  # (n rounded) w, as in Llama; n w rounded, as in OLMo; n (1 + w), Gemma
EPSILONS = ("variance_epsilon", "eps")

_forms: dict[tuple[Any, ...], "NormForm | None"] = {}  # class, eps, width, dtype -> form


class NormForm(NamedTuple):
    """What a norm computes beside its weight."""

    eps: float
    order: int


def reference(x: Tensor, weight: Tensor, form: NormForm) -> Tensor:
    """X [..., I], weight [I] -> [..., I] in x's dtype."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + form.eps)
    if form.order == ROUND_FIRST:
        return weight * normalized.to(x.dtype)
    factor = 1.0 + weight.float() if form.order == ADD_ONE else weight
    return (normalized * factor).to(x.dtype)


def reference_gradient(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, order: int) -> Tensor:
    """The gradient of x [N, I] from that of y [N, I] and rstd float32 [N]."""
    normalized = x.float() * rstd[:, None]
    slope = grad.float() * (weight.float() + 1.0 if order == ADD_ONE else weight.float())
    if order == ROUND_FIRST:
        slope = slope.to(x.dtype).float()
    return ((slope - normalized * (slope * normalized).mean(-1, keepdim=True)) * rstd[:, None]).to(x.dtype)


def form_for(norm: nn.Module, x: Tensor) -> NormForm | None:
    """The form of a norm whose kernel is chosen for x; None: run the norm itself."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    form = form_of(norm)
    takes = form is not None and x.numel() > 0 and x.dtype == norm.weight.dtype
    return form if takes and _is_chosen(x.device, x.dtype, x.shape[-1], form) else None


def form_of(norm: nn.Module) -> NormForm | None:
    """The form in which a norm is an RMSNorm bit for bit; None if it is none, or has other parameters."""
    eps = next((getattr(norm, name) for name in EPSILONS if isinstance(getattr(norm, name, None), float)), None)
    parameters = [name for name, value in norm._parameters.items() if value is not None]
    if eps is None or parameters != ["weight"]:
        return None
    weight: Any = norm.weight
    key = (type(norm), eps, weight.shape[-1], weight.dtype)
    if key not in _forms:
        _forms[key] = _measured_form(norm, *key[1:])
    return _forms[key]


@torch.no_grad()
def _measured_form(norm: nn.Module, eps: float, width: int, dtype: torch.dtype) -> NormForm | None:
    """The first order that gives the norm's bits for random rows and a random weight, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, width), (width,)))
    twin = copy.copy(norm)
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        expected = twin.forward(x)
    except Exception:  # a norm that takes something else than rows
        return None
    forms = (NormForm(eps, order) for order in (ROUND_FIRST, ROUND_LAST, ADD_ONE))
    return next((form for form in forms if torch.equal(reference(x, weight, form), expected)), None)


def rms_norm(x: Tensor, weight: Tensor, form: NormForm) -> Tensor:
    """The norm by its kernel; a reader of its result in backward may have it made again from x.

    Heads [B, H, T, D] that are a view of [B, T, H, D] are read, and returned, in that order: nothing is copied.
    """
    if x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return rms_norm(x.transpose(1, 2), weight, form).transpose(1, 2)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _kernel(x, weight, form)[0]
    result: Tensor = _RmsNorm.apply(x, weight, form)
    return set_origin(result, lambda source: _kernel(source, weight, form)[0], x)


@cache
def _is_chosen(device: torch.device, dtype: torch.dtype, width: int, form: NormForm) -> bool:
    shapes = ((probe_rows(width, dtype), width), (width,))
    x, weight = random_inputs(shapes, device, dtype)
    return is_better(
        "RMSNorm", lambda rows: rms_norm(rows, weight, form), lambda rows: reference(rows, weight, form), [x]
    )


class _RmsNorm(torch.autograd.Function):
    """One kernel each way; saves x [..., I] and rstd float32 [N]. The weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: NormForm) -> Tensor:
        """X [..., I] -> [..., I]."""
        result, rstd = _kernel(x, weight, form)
        ctx.order = form.order
        ctx.save_for_backward(x, weight, rstd)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x, written over that of the result where it is the only reader."""
        x, weight, rstd = ctx.saved_tensors
        grad = contiguous_rows(grads[0])
        out = grad if is_owned(grads[0]) and grad.is_contiguous() else torch.empty_like(grad)
        torch.ops.qlora.rms_norm_backward.default(grad, contiguous_rows(x), weight, rstd, ctx.order, out)
        return out.view(x.shape), None, None


def _kernel(x: Tensor, weight: Tensor, form: NormForm) -> tuple[Tensor, Tensor]:
    result, rstd = torch.ops.qlora.rms_norm.default(contiguous_rows(x), weight, form.eps, form.order)
    return result.view(x.shape), rstd


def forward_on_cpu(x: Tensor, weight: Tensor, eps: float, order: int) -> tuple[Tensor, Tensor]:
    """The operator in plain torch: y [N, I] and rstd float32 [N]."""
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    return reference(x, weight, NormForm(eps, order)).contiguous(), rstd


def backward_on_cpu(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, order: int, out: Tensor) -> None:
    """The gradient's operator in plain torch; fills `out`."""
    out.copy_(reference_gradient(grad, x, weight, rstd, order))


def _forward_on_gpu(x: Tensor, weight: Tensor, eps: float, order: int) -> tuple[Tensor, Tensor]:
    from qlora.model.kernels import norm_kernel  # Triton is not installed everywhere

    result, rstd = _empty(x, weight, eps, order)
    norm_kernel.forward(x, weight.contiguous(), eps, order, result, rstd)
    return result, rstd


def _backward_on_gpu(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, order: int, out: Tensor) -> None:
    from qlora.model.kernels import norm_kernel

    norm_kernel.backward(grad, x, weight.contiguous(), rstd, order, out)


def _empty(x: Tensor, weight: Tensor, eps: float, order: int) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)


register(
    "rms_norm", "(Tensor x, Tensor weight, float eps, int order) -> (Tensor, Tensor)",
    forward_on_cpu, _forward_on_gpu, _empty,
)  # fmt: skip
register(
    "rms_norm_backward", "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, int order, Tensor(a!) out) -> ()",
    backward_on_cpu, _backward_on_gpu,
)  # fmt: skip
