"""The loss: cross entropy summed over trained tokens, head and softmax in chunks, so that [T, V] never exists whole."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora.data.types import IGNORED

CHUNK_BYTES = 256 * 2**20  # of float32 logits at a time


class TokenLoss(nn.Module):
    """A causal language model as a function from a micro-batch to the sum of its token losses.

    Rows of the hidden states without a label never reach the head.  The sum, not a mean: what it is divided by is the
    whole step's count of trained tokens, which only the loop knows.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = Head(model)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """input_ids, labels, position_ids [B, T] -> float32 scalar: the sum over labels that are not IGNORED."""
        targets = labels[:, 1:]
        trained = targets != IGNORED
        hidden = self.head.hidden(input_ids, position_ids)[:, :-1][trained]
        targets = targets[trained]
        rows = self.head.chunk_rows(CHUNK_BYTES)
        total = hidden.new_zeros((), dtype=torch.float32) + 0.0 * hidden.sum().float()
        for start in range(0, len(targets), rows):
            part = hidden[start : start + rows], targets[start : start + rows]
            total = total + checkpoint(self._chunk, *part, use_reentrant=False)
        return total

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).float(), targets, reduction="sum")


class Head:
    """From hidden states to logits, exactly as the model itself goes: projection, scale, soft cap."""

    def __init__(self, model: nn.Module) -> None:
        # Held in a list, so that the loss module does not own the model's parts a second time.
        self._parts: list[Any] = [model.get_decoder(), model.get_output_embeddings()]  # type: ignore[operator]
        text = model.config.get_text_config().to_dict()  # type: ignore[operator, union-attr]
        self.softcap: float | None = text.get("final_logit_softcapping")
        self.multiply = float(text.get("logit_scale") or 1.0) / float(text.get("logits_scaling") or 1.0)
        self.vocabulary = int(self._parts[1].weight.shape[0])

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Last hidden states [B, T, I]."""
        decoder = self._parts[0]
        output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., I]."""
        logits: Tensor = self._parts[1](hidden)
        if self.multiply != 1.0:
            logits = logits * self.multiply
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def chunk_rows(self, budget_bytes: int) -> int:
        """Rows of hidden states whose float32 logits fit the budget."""
        return max(1, budget_bytes // (4 * self.vocabulary))
