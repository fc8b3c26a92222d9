"""Learning rates are pure functions of the step: laws of every schedule in the table."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.training import SCHEDULES, Optim, Train
from qlora.training.loop import factor_of, rates_sha256, steps_of
from qlora.training.schedule import warmup_steps

STEPS = st.integers(1, 2000)
WARMUP = st.one_of(st.integers(0, 2500), st.floats(0, 0.999))


def factors(kind: str, steps: int, warmup: float) -> list[float]:
    optim = Optim(schedule=kind, warmup=warmup)
    return [factor_of(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", SCHEDULES)
@settings(max_examples=60, deadline=None)
@given(steps=STEPS, warmup=WARMUP)
def test_a_rate_rises_in_the_warm_up_and_never_after(kind: str, steps: int, warmup: float) -> None:
    found, ramp = factors(kind, steps, warmup), warmup_steps(warmup, steps)
    assert all(0 < factor <= 1 for factor in found)
    rising, after = found[:ramp], found[ramp:]
    assert rising == [min(1.0, (step + 1) / ramp) for step in range(len(rising))]
    assert all(later <= earlier for earlier, later in pairwise(after))
    if after:
        assert after[0] == 1.0


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, warmup=WARMUP)
def test_closed_forms(steps: int, warmup: float) -> None:
    ramp = warmup_steps(warmup, steps)
    for step in range(ramp, steps):
        share = (step - ramp) / (steps - ramp)
        at = {kind: factor_of(Optim(schedule=kind, warmup=warmup), step, steps) for kind in SCHEDULES}
        assert at["constant"] == 1.0
        assert math.isclose(at["linear"], 1 - share, abs_tol=1e-12)
        assert math.isclose(at["cosine"], math.cos(math.pi * share / 2) ** 2, abs_tol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_zero_is_reached_just_past_the_last_step(kind: str) -> None:
    schedule = SCHEDULES[kind]
    assert schedule(100, 100, 10) == pytest.approx(0, abs=1e-15) and schedule(99, 100, 10) > 0


def test_a_warm_up_below_one_is_a_share_and_from_one_on_a_number_of_steps() -> None:
    assert [warmup_steps(w, 200) for w in (0, 0.03, 0.5, 1, 7, 300)] == [0, 6, 100, 1, 7, 300]
    assert warmup_steps(0.001, 10) == 1


def test_a_share_of_a_hundred_steps_is_its_hundredths() -> None:
    assert [warmup_steps(share / 100, 100) for share in range(100)] == list(range(100))


def test_a_part_of_an_epoch_is_rounded_up_exactly() -> None:
    for hundredths in range(1, 400):
        for rows in (10, 30, 70, 100):
            exact = math.ceil(Fraction(hundredths, 100) * rows)
            assert steps_of(Train(epochs=hundredths / 100, global_batch=1), rows) == exact, (hundredths, rows)


@given(rows=st.integers(1, 500), batch=st.integers(1, 64), epochs=st.integers(1, 5))
def test_an_epoch_trains_every_row_once(rows: int, batch: int, epochs: int) -> None:
    assert steps_of(Train(epochs=float(epochs), global_batch=batch), rows) == epochs * math.ceil(rows / batch)
    assert steps_of(Train(max_steps=7, global_batch=batch), rows) == 7


def test_rates_of_steps_taken_are_told_apart_by_value() -> None:
    one, longer = Optim(schedule="constant", warmup=5), Optim(schedule="linear", warmup=5)
    assert rates_sha256(one, 5, 100) == rates_sha256(longer, 5, 50)  # the warm-up is all they have done
    assert rates_sha256(one, 7, 100) != rates_sha256(longer, 7, 100)
    assert rates_sha256(one, 5, 100) != rates_sha256(Optim(warmup=5, learning_rate=1e-3), 5, 100)
