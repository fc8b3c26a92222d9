"""SimPO (arXiv:2405.14734): simple preference optimization, whose reward is the mean log-probability of a token.

With x = beta (log p(c) / |c| - log p(r) / |r|) - gamma,

    L = -(1 - s) log sigmoid(x) - s log sigmoid(-x)            equation 6 for s = 0

There is no reference; gamma is the margin that rewards are to reach, s as in DPO. The gradients are

    dL/dlog p(c) = -beta (sigmoid(-x) - s) / |c|       dL/dlog p(r) = beta (sigmoid(-x) - s) / |r|
"""

from torch import Tensor
from torch.nn import functional as F

from qlora.training.objectives import Objective
from qlora.training.objectives.answers import Answers


class Simpo:
    """Simple preference optimization."""

    is_paired, needs_reference, needs_kl, learns_prompts = True, False, False, False

    def __init__(self, settings: Objective) -> None:
        self.beta, self.gamma, self.smoothing = settings.beta, settings.gamma, settings.label_smoothing
        self.sft_weight = settings.sft_weight

    def losses(self, chosen: Answers, rejected: Answers, kl: Tensor) -> Tensor:
        """The loss of each pair [N]."""
        x = self.beta * (chosen.mean - rejected.mean) - self.gamma
        return -(1 - self.smoothing) * F.logsigmoid(x) - self.smoothing * F.logsigmoid(-x)

    def rewards(self, answers: Answers) -> Tensor:
        """Beta times the log-probability per token [N]."""
        return self.beta * answers.mean
