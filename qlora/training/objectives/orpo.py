"""ORPO (arXiv:2403.07691): odds ratio preference optimization, supervised learning that disfavors the rejected answer.

With a = log p(c) / |c| and b = log p(r) / |r|, means over tokens, and the odds e^a / (1 - e^a),

    L = CE(c) - beta log sigmoid(z)      z = a - b - log(1 - e^a) + log(1 - e^b)       equations 6 and 7

CE is the cross entropy per token of the chosen conversations of the whole step, prompts included, as in its authors'
code and in TRL; beta is the paper's lambda. There is no reference. Since dz/da = 1 / (1 - e^a), the gradients of the
second term are

    dL/dlog p(c) = -beta sigmoid(-z) / (1 - e^a) / |c|       dL/dlog p(r) = beta sigmoid(-z) / (1 - e^b) / |r|
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.training.objectives import Objective
from qlora.training.objectives.answers import Answers


class Orpo:
    """Odds ratio preference optimization."""

    is_paired, needs_reference, needs_kl, learns_prompts, sft_weight = True, False, False, True, 1.0

    def __init__(self, settings: Objective) -> None:
        self.beta = settings.beta

    def losses(self, chosen: Answers, rejected: Answers, kl: Tensor) -> Tensor:
        """The odds ratio term of each pair [N]; the cross entropy comes with `sft_weight`."""
        log_odds_ratio = (chosen.mean - rejected.mean) - (_log1mexp(chosen.mean) - _log1mexp(rejected.mean))
        return -self.beta * F.logsigmoid(log_odds_ratio)

    def rewards(self, answers: Answers) -> Tensor:
        """Beta times the log-probability per token [N]."""
        return self.beta * answers.mean


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0, in the form that loses no digits there (Maechler 2012); x = 0 counts as the number below.

    The form that is not taken gets an argument without effect, so that it adds no infinite gradient.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    is_small = x > -0.6931471805599453
    near, far = torch.where(is_small, x, -1.0), torch.where(is_small, -1.0, x)
    return torch.where(is_small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
