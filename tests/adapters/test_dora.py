"""Properties of DoRA: norms and directions of the merged rows, cost of a step, and rows of zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapted_models import build_adapter, freeze
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qlora.adapters.lora import LoraLinear
from qlora.quant import QUANTIZERS


def build_layer(
    kind: str = "dora", quantizer: str = "dense", shape: tuple[int, int] = (6, 5), rank: int = 3, dropout: float = 0.0
) -> LoraLinear:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*size, generator=generator) for size in (shape, shape[:1]))
    layer: LoraLinear = build_adapter(kind, rank, 4.0, dropout).wrap(freeze(weight, bias, quantizer))
    layer.reset(generator)
    return layer


@settings(max_examples=60, deadline=None)
@given(scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]), seed=st.integers(0, 999), rank=st.integers(1, 9))
def test_rows_have_the_trained_norm_and_the_direction_of_the_sum(scale: float, seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = build_layer(rank=rank)
    with torch.no_grad():
        layer.B.copy_(scale * torch.randn(layer.B.shape, generator=generator))
        layer.magnitude.copy_(3 * torch.rand(6, generator=generator))
    weight, merged = layer.base.weight(torch.float32), layer.merged_weight()
    exact = weight + layer.scaling * layer.B @ layer.A
    torch.testing.assert_close(merged.norm(dim=1), layer.magnitude.detach(), rtol=1e-5, atol=1e-6)
    assert (torch.cosine_similarity(merged, exact, dim=1) > 1 - 1e-5).all()
    # The norms without the sum are those of the sum; squares of float32 cancel where the update nearly cancels W.
    torch.testing.assert_close(layer.row_norms(weight), exact.norm(dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_and_without_a_bias_it_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for quantizer in QUANTIZERS:
        layer = build_adapter("dora", rank=3).wrap(freeze(weight, quantizer=quantizer))
        layer.reset(torch.Generator().manual_seed(0))
        x = torch.randn(7, 96).to(dtype)
        assert torch.equal(layer(x), layer.base(x))


def test_a_norm_change_of_one_percent_shows_in_bfloat16() -> None:
    """The product is rounded before it is scaled, as in PEFT: below half of bfloat16's step (0.4 %) nothing changes."""
    layer = build_layer(shape=(64, 64))
    x = torch.randn(4096, 64).bfloat16()
    before = layer(x).float().square().mean()
    with torch.no_grad():
        layer.magnitude *= 1.01
    assert 1.008 < float(layer(x).float().square().mean() / before) ** 0.5 < 1.012


def test_a_row_of_zeros_stays_zero_and_finite() -> None:
    weight = torch.randn(4, 5)
    weight[1] = 0
    layer = build_adapter("dora", rank=2).wrap(freeze(weight))
    layer.reset(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([value for value in layer.parameters() if value.requires_grad], lr=0.1)
    for _ in range(3):
        out: Tensor = layer(torch.randn(8, 5))
        assert not out[:, 1].any()
        out.square().sum().backward()
        optimizer.step()
    assert all(bool(value.isfinite().all()) for value in (*layer.parameters(), layer.merged_weight()))


# ---- cost


class DequantizeCounter(TorchDispatchMode):
    """Counts how often a quantized matrix is dequantized."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "dequantize_4bit" in str(func) and "qlora" in str(func)
        return func(*args, **(kwargs or {}))


def cost_of(kind: str, dropout: float) -> tuple[int, int]:
    """Dequantizations and floating-point operations: forward and backward of 512 tokens through [768, 512]."""
    layer = build_layer(kind, "nf4", (768, 512), rank=8, dropout=dropout).train()
    x = torch.randn(512, 512, requires_grad=True)
    with DequantizeCounter() as counter, FlopCounterMode(display=False) as flops:
        layer(x).sum().backward()
    return counter.count, flops.get_total_flops()


def test_dora_costs_one_product_of_its_rank_more_than_lora() -> None:
    (lora_count, lora_flops), (dora_count, dora_flops) = cost_of("lora", 0.0), cost_of("dora", 0.0)
    assert dora_count == lora_count == 2
    lora_flops += 2 * 8 * 512 * 512  # the last product of LoRA's backward is in place, which the counter leaves out
    # W A^T and the two small ones: 2 R (O I + R I + O R)
    assert dora_flops - lora_flops == 2 * 8 * (768 * 512 + 8 * 512 + 768 * 8)
    assert dora_flops < 1.02 * lora_flops


def test_dropout_costs_a_second_product_with_the_base() -> None:
    (_, lora_flops), (dora_count, dora_flops) = cost_of("lora", 0.1), cost_of("dora", 0.1)
    assert dora_count == 4
    assert dora_flops - lora_flops == pytest.approx(4 * 512 * 768 * 512, rel=0.02)
