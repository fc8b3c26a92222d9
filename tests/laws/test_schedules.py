"""Laws of every learning rate schedule in the table, and the number of steps of a run."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.training import SCHEDULES, Optim, Train
from qlora.training.schedule import count_steps, learning_rate_factor, rates_sha256, warmup_steps

STEPS = st.integers(1, 2000)
WARMUP = st.one_of(st.integers(0, 2500), st.floats(0, 0.999))


def factors(kind: str, steps: int, warmup: float) -> list[float]:
    optim = Optim(schedule=kind, warmup=warmup)
    return [learning_rate_factor(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=20, deadline=None)
@given(steps=STEPS, warmup=WARMUP)
def test_a_rate_rises_during_warm_up_and_never_after(kind: str, steps: int, warmup: float) -> None:
    values, ramp = factors(kind, steps, warmup), warmup_steps(warmup, steps)
    assert all(0 < factor <= 1 for factor in values)
    rising, after = values[:ramp], values[ramp:]
    assert rising == [min(1.0, (step + 1) / ramp) for step in range(len(rising))]
    assert all(later <= earlier for earlier, later in pairwise(after))
    if after:
        assert after[0] == 1.0


@settings(max_examples=20, deadline=None)
@given(steps=STEPS, warmup=WARMUP)
def test_schedules_match_their_closed_forms(steps: int, warmup: float) -> None:
    ramp = warmup_steps(warmup, steps)
    for step in range(ramp, steps):
        progress = (step - ramp) / (steps - ramp)
        factor = {kind: learning_rate_factor(Optim(schedule=kind, warmup=warmup), step, steps) for kind in SCHEDULES}
        assert factor["constant"] == 1.0
        assert math.isclose(factor["linear"], 1 - progress, abs_tol=1e-12)
        assert math.isclose(factor["cosine"], math.cos(math.pi * progress / 2) ** 2, abs_tol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_zero_is_reached_one_step_past_the_last(kind: str) -> None:
    schedule = SCHEDULES[kind]
    assert schedule(100, 100, 10) == pytest.approx(0, abs=1e-15) and schedule(99, 100, 10) > 0


def test_a_warm_up_below_one_is_a_fraction_else_a_number_of_steps() -> None:
    assert [warmup_steps(w, 200) for w in (0, 0.03, 0.5, 1, 7, 300)] == [0, 6, 100, 1, 7, 300]
    assert warmup_steps(0.001, 10) == 1


def test_a_fraction_of_a_hundred_steps_has_no_rounding_error() -> None:
    assert [warmup_steps(percentage / 100, 100) for percentage in range(100)] == list(range(100))


def test_a_fraction_of_an_epoch_is_rounded_up_exactly() -> None:
    for percentage in range(1, 400):
        for count in (10, 30, 70, 100):
            exact = math.ceil(Fraction(percentage, 100) * count)
            assert count_steps(Train(epochs=percentage / 100, global_batch=1), count) == exact, (percentage, count)


@given(count=st.integers(1, 500), batch=st.integers(1, 64), epochs=st.integers(1, 5))
def test_an_epoch_trains_every_sequence_once(count: int, batch: int, epochs: int) -> None:
    assert count_steps(Train(epochs=float(epochs), global_batch=batch), count) == epochs * math.ceil(count / batch)
    assert count_steps(Train(max_steps=7, global_batch=batch), count) == 7


def test_the_rates_of_the_steps_taken_are_compared_by_value() -> None:
    constant, linear = Optim(schedule="constant", warmup=5), Optim(schedule="linear", warmup=5)
    assert rates_sha256(constant, 5, 100) == rates_sha256(linear, 5, 50)  # all five are in the warm-up
    assert rates_sha256(constant, 7, 100) != rates_sha256(linear, 7, 100)
    assert rates_sha256(constant, 5, 100) != rates_sha256(Optim(warmup=5, learning_rate=1e-3), 5, 100)
