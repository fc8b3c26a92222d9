"""IPO (arXiv:2310.12036): identity preference optimization, on log-probabilities per token.

With h = log p(c)/q(c) / |c| - log p(r)/q(r) / |r|, |c| the trained tokens of the chosen answer,

    L = (h - 1 / (2 beta))^2                        equation 17; beta is its tau

The margin h is drawn to 1 / (2 beta), where DPO would raise it without limit. The paper's sums over tokens would make
the loss grow with the length; means, as in TRL, are what its authors used. The gradients are

    dL/dlog p(c) = 2 (h - 1 / (2 beta)) / |c|       dL/dlog p(r) = -2 (h - 1 / (2 beta)) / |r|
"""

from torch import Tensor

from qlora.training.objectives import Objective
from qlora.training.objectives.answers import Answers


class Ipo:
    """Identity preference optimization."""

    is_paired, needs_reference, needs_kl, learns_prompts = True, True, False, False

    def __init__(self, settings: Objective) -> None:
        self.beta, self.sft_weight = settings.beta, settings.sft_weight

    def losses(self, chosen: Answers, rejected: Answers, kl: Tensor) -> Tensor:
        """The loss of each pair [N]."""
        margin = chosen.log_ratio / chosen.tokens - rejected.log_ratio / rejected.tokens
        squared: Tensor = (margin - 1 / (2 * self.beta)) ** 2
        return squared

    def rewards(self, answers: Answers) -> Tensor:
        """Beta log p/q [N], as TRL reports it."""
        return self.beta * answers.log_ratio
