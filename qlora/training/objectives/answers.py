"""Log-probabilities of whole answers, as objectives get them."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """N answers of one role; of pairs, answer n of both roles is to the same prompt.

    An answer's log-probability is the sum over its trained tokens, in nats.
    """

    log_probs: Tensor  # [N], of the model in training
    reference: Tensor | None  # [N], of the reference, without gradient; None where the objective has none
    tokens: Tensor  # [N], trained tokens

    @property
    def log_ratio(self) -> Tensor:
        """Log p(answer) - log p_reference(answer) [N]."""
        assert self.reference is not None  # `needs_reference` of the objective
        return self.log_probs - self.reference

    @property
    def mean(self) -> Tensor:
        """Log-probability per token [N]."""
        return self.log_probs / self.tokens


class Comparison(Protocol):
    """The interface of an objective that compares answers.

    The loss of a step is the mean of `losses` over all pairs (or answers with a label) of the step, plus
    `sft_weight` times the mean cross entropy per token of its chosen answers, or of these and their prompts.
    """

    is_paired: bool  # chosen and rejected answers come in pairs
    needs_reference: bool
    needs_kl: bool  # an estimate of the KL to the reference, over the answers of the step
    sft_weight: float
    learns_prompts: bool  # whether the cross entropy is of the prompts too

    def losses(self, chosen: Answers, rejected: Answers, kl: Tensor) -> Tensor:
        """The loss of each pair [N]; of labeled answers, those of the chosen ones and then the others."""

    def rewards(self, answers: Answers) -> Tensor:
        """What the objective raises for chosen and lowers for rejected answers [N]."""
