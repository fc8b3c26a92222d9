"""DPO (arXiv:2305.18290): direct preference optimization, with label smoothing as in conservative DPO.

With x = beta (log p(c)/q(c) - log p(r)/q(r)), p the model, q the reference, c the chosen and r the rejected answer,

    L = -(1 - s) log sigmoid(x) - s log sigmoid(-x)

It is the negative log-likelihood of a Bradley-Terry model whose reward is beta log p/q, the closed form of the reward
that p maximizes under a KL penalty of weight beta (equation 7). s is the probability that a label is exchanged (Eric
Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023). The gradient with respect to log p(c) is

    dL/dlog p(c) = -beta (sigmoid(-x) - s) = -dL/dlog p(r)
"""

from torch import Tensor
from torch.nn import functional as F

from qlora.training.objectives import Objective
from qlora.training.objectives.answers import Answers


class Dpo:
    """Direct preference optimization."""

    is_paired, needs_reference, needs_kl, learns_prompts = True, True, False, False

    def __init__(self, settings: Objective) -> None:
        self.beta, self.smoothing = settings.beta, settings.label_smoothing
        self.sft_weight = settings.sft_weight

    def losses(self, chosen: Answers, rejected: Answers, kl: Tensor) -> Tensor:
        """The loss of each pair [N]."""
        x = self.beta * (chosen.log_ratio - rejected.log_ratio)
        return -(1 - self.smoothing) * F.logsigmoid(x) - self.smoothing * F.logsigmoid(-x)

    def rewards(self, answers: Answers) -> Tensor:
        """Beta log p/q [N]."""
        return self.beta * answers.log_ratio
