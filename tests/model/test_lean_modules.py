"""Lean modules give transformers' bits, forward and backward, and save less for backward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.model.lean_modules import LeanGatedMlp, LeanNorm, lean_version_of, replace_modules, replace_with_lean
from qlora.utils.rematerialize import ATTRIBUTE, origin_of, rowwise_checkpoint
from qlora.utils.row_chunks import CHUNK_BYTES

Zoo = Callable[..., Path]


def gradient_through(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def lean_pairs(model: Any) -> list[tuple[nn.Module, nn.Module]]:
    pairs = [(module, lean_version_of(module)) for module in model.modules()]
    return [(module, lean) for module, lean in pairs if lean is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lean_modules_equal_those_of_transformers_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).requires_grad_(False)
    pairs = lean_pairs(model)
    assert {type(lean) for _, lean in pairs} >= {LeanNorm}
    for module, lean in pairs:
        width = module.weight.shape[-1] if isinstance(lean, LeanNorm) else 64  # type: ignore[union-attr, index]
        x, grad = torch.randn(2, 5, width).to(dtype), torch.randn(2, 5, width).to(dtype)
        for expected, actual in zip(gradient_through(module, x, grad), gradient_through(lean, x, grad), strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_and_mlp_of_a_known_family_is_replaced(family: str) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    norms = sum(type(module).__name__.endswith(("RMSNorm", "LayerNorm")) for module in model.modules())
    assert replace_with_lean(model) == norms + model.config.num_hidden_layers
    assert [name for name, _ in model.named_parameters()] == names


def test_a_module_whose_lean_version_differs_is_kept() -> None:
    class Scaled(LeanGatedMlp):  # the children of a gated MLP, but the product is scaled
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in "abc")
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled()).requires_grad_(False)
    assert replace_with_lean(model) == 0
    assert type(model[0]) is Scaled
    assert replace_modules(model, lambda module, lean: True) == 1


def test_a_norm_that_trains_gets_its_gradient() -> None:
    norm = lean_version_of(nn.LayerNorm(8))
    assert norm is not None
    norm(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert all(parameter.grad is not None for parameter in norm.parameters())


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), width=st.integers(1, 9), cached=st.integers(4, 400), seed=st.integers(0, 99))
def test_a_rowwise_checkpoint_gives_the_same_bits_for_any_chunk_size(
    rows: int, width: int, cached: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two, grad = (torch.randn(rows, width, generator=generator) for _ in "abc")

    def make(a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(a) * b.exp()

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (one, two)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_BYTES, "cpu", cached)
        actual = run(lambda *leaves: rowwise_checkpoint(make, *leaves))
    for tensor, expected in zip(actual, run(make), strict=True):
        assert torch.equal(tensor, expected)


def test_readers_of_a_rematerialized_tensor_share_it_until_the_last() -> None:
    source = torch.randn(4, 3, requires_grad=True)
    tensor = rowwise_checkpoint(torch.tanh, source)
    origins = [origin_of(tensor), origin_of(tensor)]
    assert origins[0] is not None and origins[1] is not None
    first = origins[0].rematerialization.run(origins[0].sources)
    second = origins[1].rematerialization.run(origins[1].sources)
    assert first is second and torch.equal(first, tensor)
    assert origins[0].rematerialization.tensor is None


def test_nothing_is_rematerialized_without_gradients() -> None:
    with torch.no_grad():
        assert not hasattr(rowwise_checkpoint(torch.tanh, torch.randn(2, 2, requires_grad=True)), ATTRIBUTE)
    assert not hasattr(rowwise_checkpoint(torch.tanh, torch.randn(2, 2)), ATTRIBUTE)
