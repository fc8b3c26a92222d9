"""The loss: cross entropy summed over trained tokens, head and softmax in chunks, so that logits [T, V] never exist."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batching.collate import Batch
from qlora.data.types import PLAIN_LAYOUT, Layout
from qlora.model.lm_head import Head
from qlora.training.checkpointed_loss import checkpointed_loss


class TokenLoss(nn.Module):
    """A causal language model as a function from a micro-batch to the sum of its token losses.

    Only hidden states with a label reach the head. A sum, not a mean: the divisor is the number of trained tokens of
    the whole step, which only the loop knows.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = Head(model)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        layout: Layout = PLAIN_LAYOUT,
        trained: Tensor | None = None,
    ) -> Tensor:
        """input_ids, labels, position_ids [B, T] -> float32 scalar: the sum over labels that are not IGNORED.

        `trained`: Batch.trained, which token predicts which; without it the device is asked for the labels, and no
        document may be a prefix tree.
        """
        hidden = self.head.hidden_states(input_ids, position_ids, layout)
        return self.of_hidden_states(hidden, labels, trained)

    def of_hidden_states(self, hidden: Tensor, labels: Tensor, trained: Tensor | None = None) -> Tensor:
        """The same from last hidden states [B, T, I]."""
        if trained is None:
            trained = Batch(labels, labels, labels).trained
        # By index, not by mask: a mask makes the host wait for the device, in forward and in backward.
        rows = hidden.flatten(0, 1).index_select(0, trained[0])
        targets = labels.flatten().index_select(0, trained[1])
        if self.head.needs_autograd:
            return checkpointed_loss(rows, targets, self.head)
        with self.head.unsharded():
            loss: Tensor = FrozenHeadLoss.apply(rows, targets, self.head)
        return loss


class FrozenHeadLoss(torch.autograd.Function):
    """Loss and gradient in one pass over the tokens: the head is frozen, so backward needs no logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        """Hidden [N, I], targets [N] -> float32 scalar."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for _, losses in token_losses(hidden, targets, head, gradient):
            total += losses.sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient of the hidden states, multiplied by that of the loss."""
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grads[0].to(gradient.dtype), None, None


def token_losses(
    hidden: Tensor, targets: Tensor, head: Head, gradient: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Float32 losses [n, 1] of chunks of tokens; with `gradient` [N, I], those of their hidden states written there."""
    rows = head.chunk_rows()
    # One buffer for the float32 logits of all chunks: an aligning allocator can't always reuse freed memory.
    wide = hidden.new_empty(min(rows, len(targets)), head.vocab_size, dtype=torch.float32)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        raw = head.project(hidden[chunk])
        logits, slope = head.scale_and_cap(wide[: len(raw)].copy_(raw))
        chosen = logits.gather(-1, targets[chunk, None])
        probabilities, log_sum = softmax_in_place(logits)
        if gradient is not None:
            probabilities.scatter_add_(-1, targets[chunk, None], torch.full_like(chosen, -1.0))
            gradient[chunk] = head.hidden_gradient(probabilities, slope, raw)
        del raw, logits, probabilities, slope  # before the next chunk allocates its own
        yield chunk, log_sum - chosen


def softmax_in_place(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, computed in place, and log-sum-exp [N, 1]."""
    largest = logits.amax(-1, keepdim=True)
    powers = logits.sub_(largest).exp_()
    sums = powers.sum(-1, keepdim=True)
    return powers.div_(sums), sums.log() + largest
