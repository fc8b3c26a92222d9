"""The spectrum of an update equals that of the dense matrix, and the advice on its rank follows from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.adapters.plain_lora import concatenate, pad, truncate
from qlora.adapters.spectrum import (
    FITS,
    SATURATED,
    TOO_HIGH,
    UNTRAINED,
    Spectrum,
    advise,
    factors,
    mean_spectrum,
    spectrum,
)

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))


def random_pair(rank: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def planted_pair(true_rank: int, rank: int = 16, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A [rank, 64] and B [96, rank] whose product has `true_rank` directions, spread over all of A and B, and noise."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(true_rank, 64, generator=generator), torch.randn(96, true_rank, generator=generator)
    rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a = rotation @ torch.cat([a, noise * torch.randn(rank - true_rank, 64, generator=generator)])
    b = torch.cat([b, noise * torch.randn(96, rank - true_rank, generator=generator)], dim=1) @ rotation.t()
    return a, b


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.01, 50))
def test_the_singular_values_are_those_of_the_dense_update(shape: tuple[int, int, int, int], scaling: float) -> None:
    a, b = random_pair(*shape)
    result = spectrum(a, b, scaling)
    dense = torch.linalg.svdvals(scaling * (b.double() @ a.double()))
    assert result.rank == a.shape[0]
    expected = torch.nn.functional.pad(dense, (0, max(0, result.rank - len(dense))))[: result.rank]
    values = torch.tensor(result.values, dtype=torch.float64)
    # float64: beyond the smaller side of the matrix the values are rounding errors
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9 * scaling)
    assert result.norm == pytest.approx(float(dense.norm()), rel=1e-9)
    assert 1 - 1e-9 <= result.stable_rank <= result.rank + 1e-9
    assert result.energy(result.rank) == pytest.approx(1) and result.energy(0) == 0


def test_the_spectrum_of_a_stack_is_the_mean_of_its_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 6, 4, generator=generator), torch.randn(5, 9, 6, generator=generator)
    members = [spectrum(one_a, one_b, 0.5).values for one_a, one_b in zip(a, b, strict=True)]
    expected = [math.sqrt(sum(value**2 for value in column) / 5) for column in zip(*members, strict=True)]
    assert mean_spectrum(a, b, 0.5).values == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 24))
def test_a_truncated_update_is_the_best_one_and_its_error_is_as_stated(
    shape: tuple[int, int, int, int], rank: int
) -> None:
    a, b = random_pair(*shape)
    small_a, small_b = truncate({"x": (a, b)}, rank)["x"]
    kept = min(rank, len(a))
    assert small_a.shape == (kept, a.shape[1]) and small_b.shape == (b.shape[0], kept)
    dense = (b @ a).double()
    u, values, vt = torch.linalg.svd(dense, full_matrices=False)
    best = u[:, :rank] @ torch.diag(values[:rank]) @ vt[:rank]
    size = float(dense.norm())
    assert float((small_b.double() @ small_a.double() - best).norm()) <= 1e-5 * size  # A and B are float32
    stated = spectrum(a, b, 1.0).error(rank) * size
    assert float((small_b.double() @ small_a.double() - dense).norm()) == pytest.approx(stated, abs=1e-5 * size)


def test_factors_are_orthonormal_and_multiply_to_the_update() -> None:
    a, b = random_pair(7, 30, 20, 3)
    svd = factors(a, b, 0.5)
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(svd.u.t() @ svd.u, eye)
    torch.testing.assert_close(svd.v.t() @ svd.v, eye)
    torch.testing.assert_close((svd.u * svd.values) @ svd.v.t(), 0.5 * b.double() @ a.double())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.floats(-3, 3)), min_size=1, max_size=4), st.integers(0, 12))
def test_concatenated_adapters_are_the_sum_of_their_updates(adapters: list[tuple[int, float]], padding: int) -> None:
    weighted = [(weight, *random_pair(rank, 9, 11, seed)) for seed, (rank, weight) in enumerate(adapters)]
    pairs = concatenate([{"x": (a, weight * b)} for weight, a, b in weighted])
    a, b = pad(pairs, pairs["x"][0].shape[0] + padding)["x"]
    assert a.shape[0] == sum(rank for rank, _ in adapters) + padding
    expected = sum(weight * (b.double() @ a.double()) for weight, a, b in weighted)
    torch.testing.assert_close(b.double() @ a.double(), expected, rtol=0, atol=1e-5)


# ---- advice


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("true_rank", [1, 2, 3, 4, 6])
def test_a_planted_rank_is_detected_within_a_larger_one(true_rank: int, noise: float) -> None:
    spectra = [spectrum(*planted_pair(true_rank, noise=noise, seed=seed), 2.0) for seed in range(20)]
    ranks = [layer.energy_rank(0.9) for layer in spectra]
    # Random directions differ in length, so that of 6 the shortest may hold less than a tenth.
    assert all(true_rank - (true_rank > 4) <= rank <= true_rank for rank in ranks), ranks
    advice = advise(spectra)
    assert advice.verdict == TOO_HIGH and true_rank <= advice.suggested_rank <= true_rank * 4 / 3 + 1


def test_every_verdict_has_its_condition() -> None:
    flat, steep = Spectrum((1.0,) * 16), Spectrum((1.0, 0.9, 0.1) + (0.01,) * 13)
    assert advise([flat] * 9 + [steep]).verdict == SATURATED
    assert advise([flat] * 9 + [steep]).suggested_rank == 32
    assert advise([steep] * 9 + [flat]).verdict == TOO_HIGH  # one layer of ten does not decide
    assert advise([steep] * 8 + [flat] * 2).verdict == SATURATED
    medium = Spectrum((1.0,) * 11 + (0.05,) * 5)
    assert (advise([medium]).verdict, advise([medium]).suggested_rank) == (FITS, 16)
    zero = Spectrum((0.0,) * 16)
    assert advise([zero]).verdict == UNTRAINED and advise([zero, steep]).verdict == TOO_HIGH
    assert (zero.stable_rank, zero.energy_rank(0.9), zero.dead, zero.error(3)) == (0.0, 0, 16, 0.0)


def test_dead_directions_have_almost_no_energy() -> None:
    assert Spectrum((1.0, 0.5, 0.02, 0.009, 0.0)).dead == 2
    assert math.isclose(Spectrum((3.0, 4.0)).norm, 5.0)
