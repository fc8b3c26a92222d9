"""A model's head: from hidden states to logits, as many rows at a time as a bounded memory holds."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn, tanh

from qlora.distributed.unshard import whole
from qlora.model.attention import boundaries

# Of float32 logits at a time: enough rows for a matmul to be fast, few enough for a CPU's cache.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
Starts = tuple[tuple[int, ...], ...]


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
        """Whether the projection itself, or a part of it, is learnt."""
        return any(each.requires_grad for each in self._parts[1].parameters())

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
        with self.whole():
            return self.with_slope(hidden)[0]

    def whole(self) -> AbstractContextManager[None]:
        """Inside the block the projection is there, wherever its shares are kept."""
        return whole(self._parts[1])

    def as_served(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] scaled and capped in the model's own dtype, as servers answer, given in float32."""
        logits = self.project(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = tanh(logits / self.softcap) * self.softcap
        return logits.float()

    def with_slope(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and how fast they move with the projection's own output where a soft cap bends them (else None)."""
        return self.bend(self.project(hidden).float())

    def project(self, hidden: Tensor) -> Tensor:
        """The projection's own output [..., V], in its own dtype."""
        # Its `forward`, not a call: where the head is sharded, it is whole already for all chunks together.
        return self._parts[1].forward(hidden)  # type: ignore[no-any-return]

    def bend(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Float32 projections scaled and soft-capped, and the slope of the cap (None without one)."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if not self.softcap:
            return logits, None
        bent = tanh(logits / self.softcap)
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
