"""Lean modules give transformers' numbers, forward and backward, and keep half of what transformers' keep."""

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

from qlora.model.lean_modules import LeanGatedMlp, LeanNorm, lean, stand_in_of, swap
from qlora.utils.rematerialize import ATTRIBUTE, origin_of, rowwise_checkpoint

Zoo = Callable[..., Path]


def gradient_through(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def swappable(model: Any) -> list[tuple[nn.Module, nn.Module]]:
    found = [(module, stand_in_of(module)) for module in model.modules()]
    return [(module, stand_in) for module, stand_in in found if stand_in is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lean_modules_are_transformers_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).requires_grad_(False)
    pairs = swappable(model)
    assert {type(stand_in) for _, stand_in in pairs} >= {LeanNorm}
    for module, stand_in in pairs:
        width = module.weight.shape[-1] if isinstance(stand_in, LeanNorm) else 64  # type: ignore[union-attr, index]
        x, grad = torch.randn(2, 5, width).to(dtype), torch.randn(2, 5, width).to(dtype)
        for theirs, ours in zip(gradient_through(module, x, grad), gradient_through(stand_in, x, grad), strict=True):
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_and_mlp_of_a_known_family_is_swapped(family: str) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    norms = sum(type(module).__name__.endswith(("RMSNorm", "LayerNorm")) for module in model.modules())
    assert lean(model) == norms + model.config.num_hidden_layers
    assert [name for name, _ in model.named_parameters()] == names


def test_a_module_that_does_not_agree_stays() -> None:
    class Odd(LeanGatedMlp):  # the children of a gated MLP, but the product is scaled
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in "abc")
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Odd()).requires_grad_(False)
    assert lean(model) == 0
    assert type(model[0]) is Odd
    assert swap(model, lambda module, stand_in: True) == 1


def test_a_norm_that_trains_gets_its_gradient() -> None:
    norm = stand_in_of(nn.LayerNorm(8))
    assert norm is not None
    norm(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert all(parameter.grad is not None for parameter in norm.parameters())


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), width=st.integers(1, 9), cached=st.integers(4, 400), seed=st.integers(0, 99))
def test_a_row_wise_function_is_the_function_whatever_fits_the_cache(
    rows: int, width: int, cached: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two, grad = (torch.randn(rows, width, generator=generator) for _ in "abc")

    def make(a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(a) * b.exp()

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (one, two)]
        made = function(*leaves)
        return made.detach(), *torch.autograd.grad(made, leaves, grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora.utils.rematerialize.CACHED_BYTES", cached)
        ours = run(lambda *leaves: rowwise_checkpoint(make, *leaves))
    for mine, theirs in zip(ours, run(make), strict=True):
        assert torch.equal(mine, theirs)


def test_readers_of_a_replayed_tensor_share_it_and_the_last_one_drops_it() -> None:
    source = torch.randn(4, 3, requires_grad=True)
    made = rowwise_checkpoint(torch.tanh, source)
    origins = [origin_of(made), origin_of(made)]
    assert origins[0] is not None and origins[1] is not None
    first = origins[0].replay.again(origins[0].sources)
    second = origins[1].replay.again(origins[1].sources)
    assert first is second and torch.equal(first, made)
    assert origins[0].replay.made is None


def test_nothing_is_replayed_where_nothing_is_kept() -> None:
    with torch.no_grad():
        assert not hasattr(rowwise_checkpoint(torch.tanh, torch.randn(2, 2, requires_grad=True)), ATTRIBUTE)
    assert not hasattr(rowwise_checkpoint(torch.tanh, torch.randn(2, 2)), ATTRIBUTE)
