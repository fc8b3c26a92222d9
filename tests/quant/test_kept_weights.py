"""Dequantized weights while a model answers: the first layers keep theirs, up to a number of bytes, and free them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapted_models import load_base
from torch import nn

from qlora.model.generate_tokens import RowHooks, generate
from qlora.quant import Quant, build_quantizer
from qlora.quant.fourbit_linear import FourBitLinear
from qlora.quant.kept_weights import weights_kept
from qlora.runs.inference_memory import inference_memory

WIDTH = 64
BYTES = 4 * WIDTH**2  # of one matrix


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(build_quantizer(Quant()).quantize(torch.randn(WIDTH, WIDTH) / 8) for _ in range(4)))


def kept_layers(model: nn.Sequential) -> list[bool]:
    layers = [layer for layer in model if isinstance(layer, FourBitLinear)]
    return [layer.weight(torch.float32) is layer.weight(torch.float32) for layer in layers]


@torch.no_grad()
def test_the_first_layers_that_fit_keep_their_weight_and_no_bit_changes(model: nn.Sequential) -> None:
    x, stored = torch.randn(3, WIDTH), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    with weights_kept(model, 2 * BYTES + 1):
        assert all(torch.equal(model(x), expected) for _ in range(2))
        assert kept_layers(model) == [True, True, False, False]
        assert model[0].weight(torch.bfloat16).dtype == torch.bfloat16  # kept in another type
        assert model.state_dict().keys() == stored.keys()
    assert kept_layers(model) == [False] * 4
    assert torch.equal(model(x), expected)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_a_fetched_layer_keeps_nothing_and_an_error_frees_all(model: nn.Sequential) -> None:
    model[1].fetch = lambda: None
    with pytest.raises(RuntimeError), weights_kept(model):
        assert kept_layers(model) == [True, False, True, True]
        raise RuntimeError
    assert kept_layers(model) == [False] * 4


def test_commands_that_answer_keep_weights_and_training_does_not(zoo: Callable[..., Path]) -> None:
    base, kept = load_base(zoo("llama")), list[bool]()
    layer = next(module for module in base.model.modules() if isinstance(module, FourBitLinear))
    hooks = RowHooks(report=lambda *_: kept.append(layer.kept_weight is not None))
    generate(base, [[5, 6]], 2, hooks=hooks)
    with inference_memory(base):
        generate(base, [[5, 6]], 2, hooks=hooks)
    assert kept == [False, True] and layer.kept_weight is None
