"""Laws of every quantizer in the table; a new kind is tested as soon as its line is added."""

import copy
import hashlib
import json

import pytest
import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant import QUANTIZERS, Quant, blockwise, build_quantizer
from qlora.quant.block_sizes import NESTED_BLOCK
from qlora.quant.linear import FrozenLinear

SETTINGS = [
    pytest.param(kind, settings, id=f"{kind}-{'-'.join(map(str, settings.values()))}")
    for kind in QUANTIZERS
    for settings in (
        [{}] if kind == "dense" else [{"double": d, "block": b} for d, b in ((True, 64), (False, 64), (True, 32))]
    )
]
SHAPE = (96, 80)  # blocks cross the ends of rows
HALF_GAP = {"nf4": 0.1520, "fp4": 0.1667, "dense": 0.0}  # half the widest gap of the levels, in units of absmax
# Half the widest gap of the 8-bit levels and half a step of their grid, in units of nested absmax.
NESTED_HALF_GAP = 0.00706


def layer_of(kind: str, settings: dict, weight: Tensor, bias: Tensor | None = None) -> FrozenLinear:
    return QUANTIZERS[kind](**settings).quantize(weight, bias)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) / 9


@pytest.fixture
def bias() -> Tensor:
    return torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(1))


def sha256_of(layer: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in layer.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_the_error_of_a_weight_is_under_its_bound(kind: str, settings: dict, weight: Tensor) -> None:
    block = settings.get("block", 64)
    absmax = blockwise.block_absmax(weight.reshape(-1), block)
    bound = absmax * HALF_GAP[kind]
    if settings.get("double"):
        nested = blockwise.block_absmax(absmax - absmax.mean(), NESTED_BLOCK).max()
        bound = bound + nested * NESTED_HALF_GAP
    bound = bound.repeat_interleave(block)[: weight.numel()].reshape(SHAPE)
    error = (layer_of(kind, settings, weight).weight(torch.float32) - weight).abs()
    assert bool((error <= bound * (1 + 1e-5)).all())  # 1e-5: the bounds are rounded to four digits


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_forward_and_gradient_are_those_of_the_dense_weight(
    kind: str, settings: dict, weight: Tensor, bias: Tensor
) -> None:
    layer = layer_of(kind, settings, weight, bias)
    x = torch.randn(2, 3, SHAPE[1], requires_grad=True)
    dense = x.detach().clone().requires_grad_()
    y, expected = layer(x), torch.nn.functional.linear(dense, layer.weight(torch.float32), bias)
    upstream = torch.randn_like(expected)
    y.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, dense.grad, rtol=1e-5, atol=1e-5)  # float32 sums of 96 terms in another order
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_the_weight_is_rounded_once(kind: str, settings: dict, weight: Tensor) -> None:
    layer = layer_of(kind, settings, weight)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(layer.weight(dtype), layer.weight(torch.float32).to(dtype))


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_a_state_dict_and_a_deepcopy_restore_every_byte(
    kind: str, settings: dict, weight: Tensor, bias: Tensor
) -> None:
    layer = layer_of(kind, settings, weight, bias)
    other = layer_of(kind, settings, weight.flip(0), bias + 1)
    assert sha256_of(other) != sha256_of(layer)
    other.load_state_dict(layer.state_dict())
    for restored in (other, copy.deepcopy(layer)):
        assert sha256_of(restored) == sha256_of(layer)
        assert torch.equal(restored.weight(torch.float32), layer.weight(torch.float32))


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_a_layer_is_restored_from_its_description_and_tensors(
    kind: str, settings: dict, weight: Tensor, bias: Tensor
) -> None:
    for layer in (layer_of(kind, settings, weight), layer_of(kind, settings, weight, bias)):
        tensors = {name: tensor.detach() for name, tensor in layer.named_parameters()}
        restored = QUANTIZERS[kind].restore(json.loads(json.dumps(layer.describe())), tensors)
        assert type(restored) is type(layer) and sha256_of(restored) == sha256_of(layer)
        assert torch.equal(restored.weight(torch.float32), layer.weight(torch.float32))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_forward_and_backward_change_no_byte_of_the_base(
    kind: str, settings: dict, training: bool, grad: bool, weight: Tensor
) -> None:
    layer = layer_of(kind, settings, weight.bfloat16()).train(training)
    before = sha256_of(layer)
    with torch.set_grad_enabled(grad):
        for dtype in (torch.bfloat16, torch.float32):
            y = layer(torch.randn(1, SHAPE[1], dtype=dtype, requires_grad=grad))
            if grad:
                y.sum().backward()
    assert sha256_of(layer) == before


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_casting_a_model_changes_no_byte_of_the_base(kind: str, settings: dict, weight: Tensor) -> None:
    layer = layer_of(kind, settings, weight, weight[:, 0])
    before = sha256_of(layer)
    assert sha256_of(layer.to(torch.bfloat16).half().double().to("cpu")) == before
    assert {tensor.device.type for tensor in layer.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 80), (1, 1), (3, 5), (1, 64 * 256 + 1)])
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_stored_bytes_is_the_size_of_the_tensors(
    kind: str, settings: dict, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    quantizer = QUANTIZERS[kind](**settings)
    layer = quantizer.quantize(torch.randn(shape, dtype=dtype))
    assert not list(layer.buffers())
    assert quantizer.stored_bytes(*shape, dtype.itemsize) == sum(tensor.nbytes for tensor in layer.parameters())


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_a_frozen_layer_trains_nothing_and_describes_itself_as_json(
    kind: str, settings: dict, weight: Tensor, bias: Tensor
) -> None:
    layer = layer_of(kind, settings, weight.requires_grad_(), bias.requires_grad_())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    description = json.loads(json.dumps(layer.describe()))
    assert description["kind"] == kind and description["shape"] == list(SHAPE)
    assert description.items() >= settings.items()


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_quantizing_twice_gives_the_same_bytes_and_keeps_the_weight(kind: str, settings: dict, weight: Tensor) -> None:
    before = weight.clone()
    assert sha256_of(layer_of(kind, settings, weight)) == sha256_of(layer_of(kind, settings, weight))
    strided = weight.t().contiguous().t()
    assert sha256_of(layer_of(kind, settings, strided)) == sha256_of(layer_of(kind, settings, weight))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 3, 4), r"shape \[2, 3, 4\]"),
        (torch.zeros(4), r"shape \[4\]"),
        (torch.zeros(0, 4), r"shape \[0, 4\]"),
        (torch.zeros(2, 2, dtype=torch.int8), "int8"),
        (torch.zeros(2, 2, dtype=torch.float64), "float64"),
        (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "float8"),
        (torch.tensor([[1.0, torch.nan]]), "NaN"),
        (torch.tensor([[1.0, -torch.inf]], dtype=torch.bfloat16), "infinity"),
    ],
)
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_only_finite_float_matrices_are_quantized(kind: str, weight: Tensor, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        build_quantizer(Quant(kind=kind)).quantize(weight)
