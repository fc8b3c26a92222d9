"""The loss: cross entropy summed over trained tokens, head and softmax in chunks, so that [T, V] never exists whole."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora.base.attention import boundaries
from qlora.data.types import IGNORED

# Of float32 logits at a time: enough rows for a matmul to be fast, few enough for a CPU's cache.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
Starts = tuple[tuple[int, ...], ...]


class TokenLoss(nn.Module):
    """A causal language model as a function from a micro-batch to the sum of its token losses.

    Hidden states without a label never reach the head. The sum, not a mean: what it is divided by is the whole step's
    count of trained tokens, which only the loop knows.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = Head(model)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, starts: Starts = ()) -> Tensor:
        """input_ids, labels, position_ids [B, T] -> float32 scalar: the sum over labels that are not IGNORED.

        `starts`: where the documents of each row begin; absent, every row is one.
        """
        targets = labels[:, 1:]
        trained = targets != IGNORED
        hidden = self.head.hidden(input_ids, position_ids, starts)[:, :-1][trained]
        if self.head.trains:
            return checkpointed_loss(hidden, targets[trained], self.head)
        loss: Tensor = FrozenHeadLoss.apply(hidden, targets[trained], self.head)
        return loss


class Head:
    """From hidden states to logits, exactly as the model itself goes: projection, scale, soft cap."""

    def __init__(self, model: nn.Module) -> None:
        # Held in a list, so that the loss module does not own the model's parts a second time.
        self._parts: list[Any] = [model.get_decoder(), model.get_output_embeddings()]  # type: ignore[operator]
        text = model.config.get_text_config().to_dict()  # type: ignore[operator, union-attr]
        self.softcap: float | None = text.get("final_logit_softcapping")
        self.scale = float(text.get("logit_scale") or 1.0) / float(text.get("logits_scaling") or 1.0)
        self.vocabulary = int(self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """The projection [V, I]."""
        return self._parts[1].weight  # type: ignore[no-any-return]

    @property
    def trains(self) -> bool:
        """Whether the projection itself is learnt."""
        return self.weight.requires_grad

    def hidden(self, input_ids: Tensor, position_ids: Tensor, starts: Starts = ()) -> Tensor:
        """Last hidden states [B, T, I]."""
        known = self._boundaries(starts, input_ids)
        output = self._parts[0](input_ids=input_ids, position_ids=position_ids, use_cache=False, **known)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _boundaries(self, starts: Starts, input_ids: Tensor) -> dict[str, Any]:
        """What the attention kernel is told of the documents."""
        return boundaries(self._parts[0].config._attn_implementation, starts, input_ids)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., I], in float32."""
        return self.with_slope(hidden)[0]

    def with_slope(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and how fast they move with the projection's own output where a soft cap bends them (else None)."""
        return self.bend(self.project(hidden).float())

    def project(self, hidden: Tensor) -> Tensor:
        """The projection's own output [..., V], in its own dtype."""
        return self._parts[1](hidden)  # type: ignore[no-any-return]

    def bend(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Float32 projections scaled and soft-capped, and the slope of the cap (None without one)."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if not self.softcap:
            return logits, None
        bent = torch.tanh(logits / self.softcap)
        return bent * self.softcap, 1 - bent**2

    def back(self, gradient: Tensor, slope: Tensor | None, room: Tensor) -> Tensor:
        """The gradient of hidden states [..., I] from that of the logits; `gradient` is used up.

        `room`: memory for the gradient in the projection's dtype.
        """
        if slope is not None:
            gradient *= slope
        if self.scale != 1.0:
            gradient *= self.scale
        return room.copy_(gradient) @ self.weight

    def chunk_rows(self) -> int:
        """Rows of hidden states whose float32 logits are computed at a time."""
        budget_bytes = CHUNK_BYTES.get(self.weight.device.type, CHUNK_BYTES["cuda"])
        return max(1, budget_bytes // (4 * self.vocabulary))


class FrozenHeadLoss(torch.autograd.Function):
    """Loss and its gradient in one pass over the rows: the head is frozen, so the logits are never needed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        """Hidden [N, I], targets [N] -> float32 scalar."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = head.chunk_rows()
        # One room for the float32 logits of every chunk: a C library that aligns can't reuse what it has just freed.
        wide = hidden.new_empty(min(rows, len(targets)), head.vocabulary, dtype=torch.float32)
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            raw = head.project(hidden[chunk])
            logits, slope = head.bend(wide[: len(raw)].copy_(raw))
            chosen = logits.gather(-1, targets[chunk, None])
            probabilities, log_sum = _softmax_in_place(logits)
            total += (log_sum - chosen).sum()
            if gradient is not None:
                probabilities.scatter_add_(-1, targets[chunk, None], torch.full_like(chosen, -1.0))
                gradient[chunk] = head.back(probabilities, slope, raw)
            del raw, logits, probabilities, slope  # before the next chunk is made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient of the hidden states, scaled by that of the loss."""
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grads[0].to(gradient.dtype), None, None


def _softmax_in_place(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension in the memory of `logits`, and the logarithm of its sum [N, 1]."""
    largest = logits.amax(-1, keepdim=True)
    powers = logits.sub_(largest).exp_()
    sums = powers.sum(-1, keepdim=True)
    return powers.div_(sums), sums.log() + largest


def checkpointed_loss(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The same sum by autograd, logits recomputed chunk by chunk: for heads that are trained themselves."""

    def summed(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(part), wanted, reduction="sum")

    rows = head.chunk_rows()
    total = 0.0 * hidden.sum().float()
    for start in range(0, len(targets), rows):
        part = hidden[start : start + rows], targets[start : start + rows]
        total = total + checkpoint(summed, *part, use_reentrant=False)
    return total
