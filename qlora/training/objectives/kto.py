"""KTO (arXiv:2402.01306): Kahneman-Tversky optimization, of single answers that were wanted or unwanted.

With k the estimate of KL(p || q) over the step, at least 0 and without gradient,

    L = w+ (1 - sigmoid(beta (log p(c)/q(c) - k)))     of a wanted answer c
    L = w- (1 - sigmoid(beta (k - log p(r)/q(r))))     of an unwanted answer r           equation 8

k is the mean of log p/q over answers to other prompts: to each prompt of the step, an answer of another record. With s
the sigmoid in question, the gradients are

    dL/dlog p(c) = -w+ beta s (1 - s)       dL/dlog p(r) = w- beta s (1 - s)
"""

import torch
from torch import Tensor

from qlora.training.objectives import Objective
from qlora.training.objectives.answers import Answers


class Kto:
    """Kahneman-Tversky optimization."""

    is_paired, needs_reference, needs_kl, learns_prompts = False, True, True, False

    def __init__(self, settings: Objective) -> None:
        self.beta, self.sft_weight = settings.beta, settings.sft_weight
        self.chosen_weight, self.rejected_weight = settings.desirable_weight, settings.undesirable_weight

    def losses(self, chosen: Answers, rejected: Answers, kl: Tensor) -> Tensor:
        """The loss of each answer: of the wanted ones, then of the unwanted."""
        good = self.chosen_weight * (1 - torch.sigmoid(self.beta * (chosen.log_ratio - kl)))
        bad = self.rejected_weight * (1 - torch.sigmoid(self.beta * (kl - rejected.log_ratio)))
        return torch.cat([good, bad])

    def rewards(self, answers: Answers) -> Tensor:
        """Beta log p/q [N]."""
        return self.beta * answers.log_ratio
