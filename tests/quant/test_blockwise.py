"""The plain-torch reference: its levels, its layout, and its error bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.quant import Quant, blockwise, build_quantizer
from qlora.quant.levels import LEVELS, fp4_levels, nf4_levels


def test_nf4_levels_are_the_published_ones() -> None:
    published = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    torch.testing.assert_close(nf4_levels(), torch.tensor(published), rtol=0, atol=5e-8)  # 8 digits in arXiv:2305.14314


def test_fp4_levels_are_twelfths() -> None:
    half = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
    assert torch.equal(fp4_levels(), torch.cat([half, -half]))


def test_the_dynamic_type_has_256_distinct_levels() -> None:
    levels = blockwise.dynamic_levels()
    assert len(levels.unique()) == 256 and bool((levels.diff() > 0).all())
    assert levels.diff().max() / 2 < 0.00704


@pytest.mark.parametrize("kind", LEVELS)
def test_the_first_weight_of_a_pair_is_in_the_high_nibble(kind: str) -> None:
    levels = LEVELS[kind]()
    codes, absmax = blockwise.quantize(torch.tensor([[1.0, 0.0, -1.0]]), levels, 64)
    nibbles = [int(codes[0]) >> 4, int(codes[0]) & 15, int(codes[1]) >> 4]
    assert levels[nibbles].tolist() == [1.0, 0.0, -1.0]
    assert absmax.tolist() == [1.0]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(LEVELS)),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 200)),
    block=st.sampled_from([32, 64, 128, 4096]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_a_dequantized_weight_is_quantized_to_itself(
    kind: str, shape: tuple[int, int], block: int, scale: float, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    levels = LEVELS[kind]()
    codes, absmax = blockwise.quantize(weight, levels, block)
    once = blockwise.dequantize(codes, absmax, levels, block, shape)
    twice = blockwise.dequantize(*blockwise.quantize(once, levels, block), levels, block, shape)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)  # absmax may move by one rounding


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 1500), seed=st.integers(0, 1000), scale=st.sampled_from([1e-4, 1.0, 1e3]))
def test_a_restored_absmax_is_within_its_bound(count: int, seed: int, scale: float) -> None:
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * scale
    codes, nested_absmax, offset = blockwise.quantize_absmax(absmax)
    bound = nested_absmax.repeat_interleave(256)[:count] * 0.00706  # half the widest gap, and half a step of the grid
    rounding = 1e-6 * absmax.max()
    assert bool(((blockwise.restore_absmax(codes, nested_absmax, offset) - absmax).abs() <= bound + rounding).all())


def test_the_mean_error_of_nf4_is_the_published_one() -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = (build_quantizer(Quant(double=False)).quantize(weight).weight(torch.float32) - weight).abs().mean()
    assert abs(error - 0.072797) < 2e-4  # bitsandbytes publishes 0.072798; 2e-4 is 3 sd of the mean of 1024 x 1024
