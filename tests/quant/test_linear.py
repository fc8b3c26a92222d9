"""The frozen matmul under activation checkpointing, torch.compile, fake and meta tensors, and no_grad."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora.quant import Quant, Quantizer, build_quantizer
from qlora.quant.dense import Dense
from qlora.quant.linear import FrozenLinear

WIDTH = 64
NF4 = build_quantizer(Quant())


class Stack(nn.Module):
    """Three frozen layers; the input of each is multiplied by one trained matrix."""

    def __init__(self, quantizer: Quantizer, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        matrices = [(torch.randn(WIDTH, WIDTH) / 8, torch.randn(WIDTH)) for _ in range(3)]
        self.layers = nn.ModuleList(quantizer.quantize(weight, bias) for weight, bias in matrices)
        self.trained = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.recompute = recompute

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.nn.functional.silu(layer(x @ self.trained))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.recompute else self.run(x)


class DequantizeCounter(TorchDispatchMode):
    """Counts how often a 4-bit weight is dequantized."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.qlora.dequantize_4bit.default
        return func(*args, **(kwargs or {}))


def trained_grad(model: Stack, run: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = run(x)
    y.sum().backward()
    grad, model.trained.grad = model.trained.grad, None
    return y.detach(), grad


def test_no_tensor_is_saved_for_backward() -> None:
    saved: list[Tensor] = []
    layer = NF4.quantize(torch.randn(WIDTH, WIDTH), torch.randn(WIDTH))
    x = torch.randn(2, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).backward(torch.ones(2, WIDTH))
    assert saved == []


def test_recompute_changes_no_number_and_skips_the_last_product() -> None:
    layers = nn.Sequential(*(NF4.quantize(torch.randn(WIDTH, WIDTH) / 8) for _ in range(3)))

    def run(x: Tensor) -> Tensor:
        return layers[2](torch.sin(layers[1](torch.sin(layers[0](x)))))

    grads, counts = [], []
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for recompute in (False, True):
        with DequantizeCounter() as mode:
            y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
            grads.append(torch.autograd.grad(y.sum(), x)[0])
        counts.append(mode.count)
    assert torch.equal(*grads)
    assert counts == [6, 8]  # 3 forward and 3 backward; the recompute stops before the third layer


def test_a_frozen_layer_supports_second_derivatives() -> None:
    layer = NF4.quantize(torch.randn(WIDTH, WIDTH))
    x = torch.randn(2, WIDTH, requires_grad=True)
    (grad,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    weight = layer.weight(torch.float32)
    expected = 2 * torch.ones_like(x) @ weight.t() @ weight
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-3)  # sums of 64 float32 products


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("quantizer", [NF4, Dense()], ids=["nf4", "dense"])
def test_compiling_breaks_no_graph_and_keeps_no_weight(quantizer: Quantizer, recompute: bool) -> None:
    kept: list[tuple[int, ...]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        rebuilt = [node for node in graph.graph.nodes if "dequantize_4bit" in str(node.target)]
        outputs = graph.graph.output_node().args[0]
        kept.extend(tuple(node.meta["val"].shape) for node in rebuilt if node in outputs)
        assert quantizer == Dense() or rebuilt
        return make_boxed_func(graph)

    torch._dynamo.reset()
    model = Stack(quantizer, recompute)
    backend = aot_autograd(fw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(2, WIDTH)
    expected = trained_grad(model, model, x)
    compiled = trained_grad(model, torch.compile(model, fullgraph=True, backend=backend), x)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)  # the same sums, in another order
    assert kept == []


@pytest.mark.parametrize("quantizer", [NF4, Dense()], ids=["nf4", "dense"])
def test_shapes_are_known_without_computing(quantizer: Quantizer) -> None:
    layer: FrozenLinear = quantizer.quantize(torch.randn(48, 32), torch.randn(48))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 3, 32, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (2, 3, 48) and x.grad is not None and x.grad.shape == x.shape
    assert layer.to("meta")(torch.randn(2, 32, device="meta")).shape == (2, 48)


@pytest.mark.parametrize("double", [True, False])
def test_the_operator_passes_opcheck(double: bool) -> None:
    layer = build_quantizer(Quant(double=double)).quantize(torch.randn(8, 64))
    stored = [tensor.detach() for tensor in layer.parameters()]
    for after in (None, torch.zeros(2)):
        opcheck(torch.ops.qlora.dequantize_4bit.default, (stored, 64, "nf4", (8, 64), torch.bfloat16, after))


def test_without_grad_there_is_no_graph() -> None:
    layer = NF4.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    assert layer(x.detach()).grad_fn is None


def test_the_output_has_the_type_of_the_input() -> None:
    layer = NF4.quantize(torch.randn(8, 64, dtype=torch.bfloat16), torch.randn(8, dtype=torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
