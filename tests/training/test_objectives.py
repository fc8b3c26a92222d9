"""Objectives that compare answers: gradients, known values, and the formulas in their files."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.training.objectives import OBJECTIVES, Objective
from qlora.training.objectives.answers import Answers, Comparison

KINDS = [kind for kind in OBJECTIVES if kind != "sft"]
SETTINGS: Mapping[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.3},
    "orpo": {"beta": 0.4},
    "simpo": {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.2},
    "kto": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
}
CHOSEN, REJECTED = (torch.tensor(values, dtype=torch.float64) for values in ([-9.0, -4.5, -0.2], [-7.0, -6.0, -3.0]))
TOKENS = torch.tensor([3.0, 2.0, 5.0], dtype=torch.float64)
KL = torch.tensor(0.3, dtype=torch.float64)


def objective(kind: str) -> Comparison:
    built: Comparison = OBJECTIVES[kind](Objective(kind=kind, **SETTINGS[kind]))
    return built


def losses(kind: str, chosen: Tensor, rejected: Tensor) -> Tensor:
    sides = Answers(chosen, CHOSEN + 0.4, TOKENS), Answers(rejected, REJECTED - 0.6, TOKENS + 1)
    return objective(kind).losses(*sides, KL)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    sides = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: losses(kind, c, r), sides, atol=1e-9)


def documented(kind: str) -> tuple[Tensor, Tensor]:
    """The gradients that the docstring of the kind's file gives."""
    s, values = torch.sigmoid, SETTINGS[kind]
    beta, ratio_c, ratio_r = values["beta"], torch.tensor(-0.4), torch.tensor(0.6)
    a, b, more = CHOSEN / TOKENS, REJECTED / (TOKENS + 1), TOKENS + 1
    if kind == "dpo":
        weight = -beta * (s(-beta * (ratio_c - ratio_r)) - values["label_smoothing"])
        return weight.expand(3), -weight.expand(3)
    if kind == "ipo":
        error = 2 * (ratio_c / TOKENS - ratio_r / more - 1 / (2 * beta))
        return error / TOKENS, -error / more
    if kind == "orpo":
        z = a - b - torch.log(1 - a.exp()) + torch.log(1 - b.exp())
        weight = beta * s(-z)
        return -weight / (1 - a.exp()) / TOKENS, weight / (1 - b.exp()) / more
    if kind == "simpo":
        weight = beta * (s(-(beta * (a - b) - values["gamma"])) - values["label_smoothing"])
        return -weight / TOKENS, weight / more
    good, bad = s(beta * (ratio_c - KL)), s(beta * (KL - ratio_r))
    chosen = -values["desirable_weight"] * beta * good * (1 - good)
    return chosen.expand(3), (values["undesirable_weight"] * beta * bad * (1 - bad)).expand(3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_that_the_file_derives(kind: str) -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses(kind, chosen, rejected).sum().backward()
    for actual, expected in zip((chosen.grad, rejected.grad), documented(kind), strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_more_likely_chosen_answer_lowers_loss_and_raises_reward(kind: str) -> None:
    before, after = (losses(kind, CHOSEN + change, REJECTED) for change in (0.0, 0.05))
    assert (after < before)[: len(CHOSEN)].all()
    worse = losses(kind, CHOSEN, REJECTED + 0.05)
    assert (worse > before)[-len(REJECTED) :].all()
    answers = [Answers(CHOSEN + change, CHOSEN, TOKENS) for change in (0.0, 0.05)]
    assert (objective(kind).rewards(answers[1]) > objective(kind).rewards(answers[0])).all()


def test_losses_of_a_model_that_equals_its_reference() -> None:
    same = Answers(CHOSEN, CHOSEN, TOKENS), Answers(REJECTED, REJECTED, TOKENS)
    values = {kind: OBJECTIVES[kind](Objective(kind=kind)).losses(*same, 0 * KL) for kind in ("dpo", "ipo", "kto")}
    assert values["dpo"].tolist() == pytest.approx([math.log(2)] * 3)
    assert values["ipo"].tolist() == pytest.approx([25.0] * 3)
    assert values["kto"].tolist() == pytest.approx([0.5] * 6)


def test_the_odds_ratio_of_near_certain_answers_is_finite() -> None:
    certain = torch.tensor([-1e-12, 0.0, -1e-3], dtype=torch.float64).requires_grad_()
    sides = Answers(certain, None, TOKENS), Answers(REJECTED, None, TOKENS)
    values = objective("orpo").losses(*sides, KL)
    values.sum().backward()
    assert certain.grad is not None and torch.isfinite(values).all() and torch.isfinite(certain.grad).all()
