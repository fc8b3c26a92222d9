"""Adapted matrices that share an input: one function gives what they give one by one, and a step keeps their casts."""

import pytest
import torch
from torch import Tensor

from qlora.adapters.lora import LoraLinear
from qlora.adapters.lora_group import together
from qlora.adapters.step_casts import casts_kept, casts_of
from qlora.quant import Quant, build_quantizer
from qlora.utils.rematerialize import rowwise_checkpoint

WIDTH, OUTPUTS, RANKS = 32, (48, 16, 16), (4, 2, 4)


def layers(dropout: float = 0.0) -> list[LoraLinear]:
    torch.manual_seed(0)
    quantizer = build_quantizer(Quant())
    biases = (None, torch.randn(OUTPUTS[1]), None)
    built = []
    for outputs, rank, bias in zip(OUTPUTS, RANKS, biases, strict=True):
        base = quantizer.quantize(torch.randn(outputs, WIDTH), bias)
        layer = LoraLinear(base, rank, 0.5 * rank, dropout)
        layer.A.data.normal_()
        layer.B.data.normal_()
        built.append(layer)
    return built


def gradients(grouped: bool, dtype: torch.dtype, rematerializes: bool, kept: bool = False) -> list[Tensor]:
    """Outputs and all gradients; every second matrix keeps what it started from (pissa)."""
    group = layers()
    group[2].A0, group[2].B0 = torch.randn(4, WIDTH), torch.randn(16, 4)
    leaf = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    x = rowwise_checkpoint(torch.tanh, leaf) if rematerializes else leaf
    outputs = together(x, group) if grouped else [layer(x) for layer in group]
    assert outputs is not None
    loss = sum((output.float() * (index + 1)).square().mean() for index, output in enumerate(outputs))
    loss.backward()  # type: ignore[union-attr]
    tensors = [leaf.grad, *(side.grad for layer in group for side in (layer.A, layer.B))]
    return [*(output.detach() for output in outputs), *(tensor for tensor in tensors if tensor is not None)]


@pytest.mark.parametrize("rematerializes", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str)
def test_a_group_gives_what_its_layers_give(dtype: torch.dtype, tolerance: float, rematerializes: bool) -> None:
    torch.manual_seed(0)
    pairs = zip(gradients(True, dtype, rematerializes), gradients(False, dtype, rematerializes), strict=True)
    for value, expected in pairs:
        assert value.dtype == expected.dtype
        size = float(expected.float().abs().max())
        torch.testing.assert_close(value.float(), expected.float(), rtol=tolerance, atol=tolerance * size)


def test_layers_that_a_group_can_not_hold_run_one_by_one() -> None:
    x, float16, off = torch.randn(2, WIDTH), layers(), layers()
    float16[1].base.product_dtype = torch.float16
    off[1].active = False
    assert all(together(x, group) is None for group in (float16, off, layers(0.1)))
    with torch.no_grad():
        assert together(x, layers()) is None
    assert together(x, [layer.eval() for layer in layers(0.1)]) is not None


def test_a_step_on_a_gpu_makes_each_cast_once() -> None:
    made: list[int] = []

    def make() -> tuple[Tensor, ...]:
        made.append(1)
        return (torch.zeros(1),)

    for device, expected in (("cuda", 2), ("cpu", 4)):
        made.clear()
        for _ in range(2):  # steps, between which the optimizer changes A and B
            with casts_kept(torch.device(device)):
                casts_of(("layer",), make)
                casts_of(("layer",), make)
        assert len(made) == expected
    casts_of(("layer",), make)
    casts_of(("layer",), make)
    assert len(made) == 6
