"""Samples of long parameter lists: each run has every kind, and all runs together have every case."""

import pytest
from support.case_samples import QUICK, drawn
from support.paths import ROOT

PAIRS = [{"family": family, "kind": kind} for family in "abcdefg" for kind in ("x", "y", "z")]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 21])
@pytest.mark.parametrize("of", [2, 3, 4])
def test_all_seeds_together_draw_every_case(count: int, of: int) -> None:
    samples = [drawn(PAIRS[:count], of, (), seed) for seed in range(of * count)]
    assert set.union(*samples) == {*range(count)}
    assert all(1 <= len(sample) <= -(-count // of) for sample in samples)


@pytest.mark.parametrize("seed", range(6))
def test_a_sample_has_every_value_of_the_named_parameters(seed: int) -> None:
    sample = [PAIRS[index] for index in drawn(PAIRS, 7, ("family", "kind"), seed)]
    assert {case["family"] for case in sample} == {*"abcdefg"} and {case["kind"] for case in sample} == {*"xyz"}
    assert len(sample) <= 12


def test_neighbors_differ_in_the_inner_parameter() -> None:
    assert {PAIRS[index]["kind"] for index in drawn(PAIRS, 3, (), 0)} == {*"xyz"}


def test_the_expression_is_that_of_make_test() -> None:
    """With another one all sampled cases would be left out, and no test would say so."""
    assert f"-m '{QUICK}'" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
