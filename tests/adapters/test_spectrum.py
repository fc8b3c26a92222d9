"""What is said of an update's rank is true of the matrix it makes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.adapters.plain_lora import concatenated, padded, truncated
from qlora.adapters.spectrum import FITS, SATURATED, TOO_HIGH, UNTRAINED, Spectrum, advise, factors, spectrum

shapes = st.tuples(st.integers(1, 24), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))


def pair(rank: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def planted(true_rank: int, rank: int = 16, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A [rank, 64] and B [96, rank] whose product has `true_rank` directions, hidden in all rows, and noise."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(true_rank, 64, generator=generator), torch.randn(96, true_rank, generator=generator)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a = turn @ torch.cat([a, noise * torch.randn(rank - true_rank, 64, generator=generator)])
    b = torch.cat([b, noise * torch.randn(96, rank - true_rank, generator=generator)], dim=1) @ turn.t()
    return a, b


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.01, 50))
def test_the_singular_values_are_those_of_the_dense_update(shape: tuple[int, int, int, int], scaling: float) -> None:
    a, b = pair(*shape)
    found = spectrum(a, b, scaling)
    dense = torch.linalg.svdvals(scaling * (b.double() @ a.double()))
    assert found.rank == a.shape[0]
    expected = torch.nn.functional.pad(dense, (0, max(0, found.rank - len(dense))))[: found.rank]
    # float64: what is left of directions that a side of fewer than R can't hold is rounding
    torch.testing.assert_close(
        torch.tensor(found.values, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9 * scaling
    )
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-9)
    assert 1 - 1e-9 <= found.stable_rank <= found.rank + 1e-9
    assert found.energy(found.rank) == pytest.approx(1) and found.energy(0) == 0


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 24))
def test_a_truncated_update_is_the_best_approximation_and_its_error_is_the_one_stated(
    shape: tuple[int, int, int, int], rank: int
) -> None:
    a, b = pair(*shape)
    small_a, small_b = truncated({"x": (a, b)}, rank)["x"]
    assert small_a.shape == (rank, a.shape[1]) and small_b.shape == (b.shape[0], rank)
    dense = (b @ a).double()
    u, values, vt = torch.linalg.svd(dense, full_matrices=False)
    best = u[:, :rank] @ torch.diag(values[:rank]) @ vt[:rank]
    size = float(dense.norm())
    assert float((small_b.double() @ small_a.double() - best).norm()) <= 1e-5 * size  # A and B are float32
    stated = spectrum(a, b, 1.0).error(rank) * size
    assert float((small_b.double() @ small_a.double() - dense).norm()) == pytest.approx(stated, abs=1e-5 * size)


def test_factors_are_orthonormal_and_make_the_update() -> None:
    a, b = pair(7, 30, 20, 3)
    found = factors(a, b, 0.5)
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(found.u.t() @ found.u, eye)
    torch.testing.assert_close(found.v.t() @ found.v, eye)
    torch.testing.assert_close((found.u * found.values) @ found.v.t(), 0.5 * b.double() @ a.double())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.floats(-3, 3)), min_size=1, max_size=4), st.integers(0, 12))
def test_adapters_side_by_side_are_the_sum_of_their_updates(parts: list[tuple[int, float]], more: int) -> None:
    sides = [(weight, *pair(rank, 9, 11, seed)) for seed, (rank, weight) in enumerate(parts)]
    whole = concatenated([{"x": (a, weight * b)} for weight, a, b in sides])
    a, b = padded(whole, whole["x"][0].shape[0] + more)["x"]
    assert a.shape[0] == sum(rank for rank, _ in parts) + more
    expected = sum(weight * (b.double() @ a.double()) for weight, a, b in sides)
    torch.testing.assert_close(b.double() @ a.double(), expected, rtol=0, atol=1e-5)


# ---- what is advised


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("true_rank", [1, 2, 3, 4, 6])
def test_a_planted_rank_is_found_within_a_larger_one(true_rank: int, noise: float) -> None:
    found = [spectrum(*planted(true_rank, noise=noise, seed=seed), 2.0) for seed in range(20)]
    ranks = [each.energy_rank(0.9) for each in found]
    # Random directions differ in length, so that of 6 the shortest may hold less than a tenth.
    assert all(true_rank - (true_rank > 4) <= rank <= true_rank for rank in ranks), ranks
    advice = advise(found)
    assert advice.verdict == TOO_HIGH and true_rank <= advice.suggested_rank <= true_rank * 4 / 3 + 1


def test_every_verdict_has_its_reason() -> None:
    flat, room = Spectrum((1.0,) * 16), Spectrum((1.0, 0.9, 0.1) + (0.01,) * 13)
    assert advise([flat] * 9 + [room]).verdict == SATURATED
    assert advise([flat] * 9 + [room]).suggested_rank == 32
    assert advise([room] * 9 + [flat]).verdict == TOO_HIGH  # one layer of ten does not decide
    assert advise([room] * 8 + [flat] * 2).verdict == SATURATED
    middle = Spectrum((1.0,) * 11 + (0.05,) * 5)
    assert (advise([middle]).verdict, advise([middle]).suggested_rank) == (FITS, 16)
    nothing = Spectrum((0.0,) * 16)
    assert advise([nothing]).verdict == UNTRAINED and advise([nothing, room]).verdict == TOO_HIGH
    assert (nothing.stable_rank, nothing.energy_rank(0.9), nothing.dead, nothing.error(3)) == (0.0, 0, 16, 0.0)


def test_dead_directions_hold_next_to_nothing() -> None:
    assert Spectrum((1.0, 0.5, 0.02, 0.009, 0.0)).dead == 2
    assert math.isclose(Spectrum((3.0, 4.0)).norm, 5.0)
