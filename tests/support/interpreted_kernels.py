"""The Triton kernels of a decoder layer in Triton's interpreter; model/test_kernels.py runs this file."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from qlora.model.kernels import gated_product, norm_kernel, product_kernel, rms_norm, rotary_kernel, rotary_pair
from qlora.model.kernels.rms_norm import NormForm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = [rms_norm.ROUND_FIRST, rms_norm.ROUND_LAST, rms_norm.ADD_ONE]
# Every shape in float32, and what rounding can depend on in 16 bits.
SHAPES = [(0, 7), (1, 1), (3, 7), (5, 100), (1, 4097), (2, 8193)]
CASES = [*((shape, torch.float32) for shape in SHAPES), *(((3, 100), dtype) for dtype in DTYPES[1:])]
EPS = 1e-6


@pytest.fixture(autouse=True)
def round_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (Triton 3.9) truncates to bfloat16; a GPU rounds to the nearest, as torch does."""
    builder: Any = interpreter.InterpreterBuilder

    def convert(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return builder.cast_impl(self, source, target)
        rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), target.scalar)

    monkeypatch.setattr(builder, "create_fp_trunc", convert)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(rows: Tensor) -> Tensor:
    """The same values in rows that lie apart in memory."""
    return torch.cat([rows, rows * 2], dim=-1)[:, : rows.shape[-1]]


def check(values: Sequence[Tensor], references: Sequence[Tensor], terms: float = 0.0) -> None:
    """float32 within 1e-6, 16 bits within one rounding, of the values and of the size of their `terms`."""
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    for value, reference in zip(values, references, strict=True):
        assert value.dtype == reference.dtype and value.shape == reference.shape
        exact = reference.float()
        allowed = tolerance[value.dtype] * (exact.abs() + exact.square().mean().sqrt() + terms)
        error = (value.float() - exact).abs()
        assert bool((error <= allowed).all()), (error - allowed).max()


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    return torch.autograd.grad((outputs,) if isinstance(outputs, Tensor) else outputs, leaves, grads)


@pytest.mark.sample(of=6, every=("order", "shape", "dtype"))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, order: int) -> None:
    form = NormForm(EPS, order)
    x, grad, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[1], dtype=dtype)
    out, rstd = torch.empty_like(x), torch.empty(len(x))
    norm_kernel.forward(apart(x), weight, EPS, order, out, rstd)
    check([out, rstd], [rms_norm.reference(x, weight, form), torch.rsqrt(x.float().square().mean(-1) + EPS)])
    expected = gradients(lambda leaf: rms_norm.reference(leaf, weight, form), [x], [grad])
    result = torch.empty_like(x)
    norm_kernel.backward(apart(grad), apart(x), weight, rstd, order, result)
    terms = float((grad.float() * (weight.float() + 1) * rstd[:, None]).norm()) if shape[1] == 1 else 0.0  # they cancel
    check([result, rms_norm.reference_gradient(grad, x, weight, rstd, order)], [*expected, *expected], terms)
    norm_kernel.backward(grad, x, weight, rstd, order, grad)  # over its own input
    assert torch.equal(grad, result)


@pytest.mark.sample(of=6, every=("act", "shape", "dtype"))
@pytest.mark.parametrize("act", [0, 1, 2])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_gated_product(shape: tuple[int, int], dtype: torch.dtype, act: int) -> None:
    gate, up, grad = (random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    out = torch.empty_like(gate)
    product_kernel.forward(apart(gate), apart(up), act, out)
    check([out], [gated_product.reference(gate, up, act)])
    expected = gradients(lambda *leaves: gated_product.reference(*leaves, act=act), [gate, up], [grad])
    halves = torch.empty(shape[0], 2 * shape[1], dtype=dtype).chunk(2, dim=-1)
    product_kernel.backward(apart(grad), apart(gate), apart(up), act, halves)
    check([*halves, *gated_product.reference_gradients(grad, gate, up, act)], [*expected, *expected])
    up_out = torch.empty_like(up)
    product_kernel.backward(grad, gate, up, act, (grad, up_out))  # over its own input
    assert torch.equal(grad, halves[0]) and torch.equal(up_out, halves[1])


@pytest.mark.sample(of=4, every=("dtype",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "width", "tokens", "own"), [
    (4, 2, 8, 2, False), (9, 1, 96, 2, True), (1, 1, 2, 1, False), (2, 1, 8, 3, False), (2, 2, 8, 0, False),
])  # fmt: skip
def test_rotary_pair(heads: int, key_heads: int, width: int, tokens: int, own: bool, dtype: torch.dtype) -> None:
    pair = [random(2, tokens, n, width, dtype=dtype).transpose(1, 2) for n in (heads, key_heads)]
    grads = [random(2, n, tokens, width, dtype=dtype, seed=1) for n in (heads, key_heads)]
    cos, sin = (random(2 if own else 1, tokens, width, dtype=dtype, seed=seed) for seed in (2, 3))
    for inputs, inverse in ((pair, False), (grads, True)):
        outs = [torch.empty_like(tensor) for tensor in inputs]
        rotary_kernel.rotate(tuple(inputs), cos, sin, inverse, tuple(outs))
        reference = lambda *leaves: rotary_pair.reference(*leaves, cos, sin)  # noqa: E731
        expected = gradients(reference, pair, grads) if inverse else reference(*pair)
        plain = rotary_pair.on_cpu(*inputs, cos, sin, inverse)
        check([*outs, *plain], [*expected, *expected])
