"""Log-probabilities of answers, head and softmax in chunks, so that logits [T, V] never exist.

The gradient of a token's log-probability with respect to its hidden state does not depend on the loss: it is computed
in the one pass over the head that forward makes, and backward multiplies it by the derivative of the loss with respect
to the answer's log-probability. Peak memory is that of supervised training.
"""

from typing import Any

import torch
from torch import Tensor

from qlora.data.types import PLAIN_LAYOUT, Layout
from qlora.model.lm_head import Head
from qlora.training.checkpointed_loss import checkpointed_token_losses
from qlora.training.loss import TokenLoss, token_losses


class SideLogProbs(TokenLoss):
    """A causal language model as a function from a micro-batch to the log-probabilities of its answers.

    Called without `side_tokens` it is the loss of supervised training.
    """

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        layout: Layout = PLAIN_LAYOUT,
        trained: Tensor | None = None,
        side_tokens: tuple[int, ...] | None = None,
    ) -> Tensor:
        """As TokenLoss; with `side_tokens` of a SideBatch, float32 [S]: the sum over each answer's tokens, in nats."""
        if side_tokens is None or trained is None:
            return super().forward(input_ids, labels, position_ids, layout, trained)
        hidden = self.head.hidden_states(input_ids, position_ids, layout)
        rows = hidden.flatten(0, 1).index_select(0, trained[0])
        targets = labels.flatten().index_select(0, trained[1])
        log_probs = token_log_probs(rows, targets, self.head)
        sums = [answer.sum()[None] for answer in log_probs.split(side_tokens)] if side_tokens else [log_probs]
        return torch.cat(sums)


def token_log_probs(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Hidden [N, I], targets [N] -> float32 [N]: the log-probability of each target."""
    if head.needs_autograd:
        return -checkpointed_token_losses(hidden, targets, head)
    with head.unsharded():
        log_probs: Tensor = FrozenHeadLogProbs.apply(hidden, targets, head)
    return log_probs


class FrozenHeadLogProbs(torch.autograd.Function):
    """Log-probabilities and their gradients in one pass over the tokens: the head is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        """Hidden [N, I], targets [N] -> float32 [N]."""
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk, losses in token_losses(hidden, targets, head, gradient):
            log_probs[chunk] = losses.squeeze(-1).neg_()
        ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient of the hidden states: each row times that of its log-probability."""
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient.mul_(-grads[0][:, None]), None, None
