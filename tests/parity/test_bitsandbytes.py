"""bitsandbytes as reference: the readable reference, our layers and its functions give the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.quant import Quant, bitsandbytes_ops, blockwise, build_quantizer
from qlora.quant.levels import LEVELS

bnb = pytest.importorskip("bitsandbytes.functional")

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 700))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices of all sizes and three dtypes, with rows of zeros, ties and outliers."""
    rows, columns = draw(SIZES), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1e-3, 0.02, 1.0, 100.0]))
    match draw(st.sampled_from(["normal", "zeros", "ties", "outlier"])):
        case "zeros":
            weight[torch.rand(rows, generator=generator) < 0.7] = 0
        case "ties":
            weight = (weight * 4).round() / 4
        case "outlier":
            weight[0, 0] *= 100
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@pytest.mark.parametrize("kind", LEVELS)
def test_the_levels_are_those_of_bitsandbytes(kind: str) -> None:
    assert torch.equal(LEVELS[kind](), bnb.get_4bit_type(kind, device="cpu"))
    assert torch.equal(blockwise.dynamic_levels(), bnb.create_dynamic_map())


@settings(max_examples=150, deadline=None)
@given(weight=weights(), kind=st.sampled_from(sorted(LEVELS)), block=st.sampled_from(BLOCKS))
def test_the_reference_quantizes_as_bitsandbytes_bit_for_bit(weight: Tensor, kind: str, block: int) -> None:
    levels, shape = LEVELS[kind](), (weight.shape[0], weight.shape[1])
    codes, absmax = blockwise.quantize(weight, levels, block)
    expected, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind)
    assert torch.equal(codes, expected.reshape(-1)) and torch.equal(absmax, state.absmax)

    fast = bitsandbytes_ops.quantize(weight, kind, block)
    assert torch.equal(fast[0], codes) and torch.equal(fast[1], absmax)

    restored = blockwise.dequantize(codes, absmax, levels, block, shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fast = bitsandbytes_ops.dequantize([codes, absmax], block, kind, shape, dtype, None)
        assert torch.equal(fast, restored.to(dtype))


@pytest.mark.parametrize("kind", LEVELS)
def test_floats_near_a_midpoint_get_the_codes_of_bitsandbytes(kind: str) -> None:
    rising = LEVELS[kind]().sort().values
    midpoints = (rising[:-1] + rising[1:]) / 2
    neighbors = [midpoints]
    for end in (-2.0, 2.0):
        step = midpoints
        for _ in range(40):
            step = torch.nextafter(step, torch.full_like(step, end))
            neighbors.append(step)
    cells = torch.arange(-2048, 2049) / 2048
    edges = [cells, torch.nextafter(cells, cells + 1), torch.nextafter(cells, cells - 1)]
    values = torch.cat([*neighbors, *edges]).clamp(-1, 1)
    values = torch.cat([values, torch.zeros(-len(values) % 31)]).reshape(-1, 31)
    # The column of ones gives each block of 32 the absmax 1, so that values are not scaled.
    weight = torch.cat([values, torch.ones(len(values), 1)], dim=1)
    expected, state = bnb.quantize_4bit(weight, blocksize=32, quant_type=kind)
    codes, absmax = bitsandbytes_ops.quantize(weight, kind, 32)
    assert torch.equal(codes, expected.reshape(-1)) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("shape", [(700, 701), (1, 2**16 + 5), (3, 2**17)])
def test_large_matrices_are_quantized_in_chunks_to_the_same_bits(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    codes, absmax = bitsandbytes_ops.quantize(weight, kind, 64)
    assert torch.equal(codes, expected.reshape(-1)) and torch.equal(absmax, state.absmax)


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 10**6), scale=st.sampled_from([1e-4, 0.1, 1.0, 50.0]))
def test_the_reference_quantizes_absmax_as_bitsandbytes_bit_for_bit(count: int, seed: int, scale: float) -> None:
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * scale
    reference, fast = blockwise.quantize_absmax(absmax), bitsandbytes_ops.quantize_absmax(absmax)
    assert all(torch.equal(expected, value) for expected, value in zip(reference, fast, strict=True))
    assert torch.equal(blockwise.restore_absmax(*reference), bitsandbytes_ops.restore_absmax(*fast))


@settings(max_examples=100, deadline=None)
@given(weight=weights(), kind=st.sampled_from(sorted(LEVELS)), double=st.booleans(), rows=st.integers(1, 40))
def test_a_layer_stores_and_dequantizes_what_bitsandbytes_does(
    weight: Tensor, kind: str, double: bool, rows: int
) -> None:
    # Whole blocks per row, and more than one byte: otherwise bitsandbytes' CPU kernel is wrong, slow or transposed.
    weight = weight.reshape(-1)[:128].repeat(128)[: 64 * (weight.numel() % 5 + 1)].repeat(rows, 1)
    layer = build_quantizer(Quant(kind=kind, double=double)).quantize(weight)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    assert torch.equal(layer.codes, codes.reshape(-1)) and torch.equal(layer.absmax, state.absmax)
    if double:
        assert torch.equal(layer.nested_absmax, state.state2.absmax) and torch.equal(layer.offset[0], state.offset)
    assert torch.equal(layer.weight(weight.dtype), bnb.dequantize_4bit(codes, state))


def test_zero_blocks_stay_zero() -> None:
    for kind in LEVELS:
        for double in (True, False):
            layer = build_quantizer(Quant(kind=kind, double=double)).quantize(torch.zeros(5, 77))
            assert not layer.weight(torch.float32).any()
