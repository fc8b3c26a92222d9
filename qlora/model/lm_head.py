"""LM head: hidden states to logits, as many rows at a time as a memory budget allows.

logits = softcap * tanh(scale * (h W^T) / softcap)    h [..., I], W [V, I]; without a soft cap: scale * (h W^T)
"""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn, tanh

from qlora.distributed.unshard import unsharded
from qlora.model.attention import document_kwargs
from qlora.model.logits_chunk import LOGITS_CHUNK_BYTES

DocumentStarts = tuple[tuple[int, ...], ...]


class Head:
    """Hidden states to logits as the model computes them: projection, scale, soft cap."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder: Any = model.get_decoder()  # type: ignore[operator]
        self.projection: Any = model.get_output_embeddings()  # type: ignore[operator]
        text = model.config.get_text_config().to_dict()  # type: ignore[operator, union-attr]
        self.softcap: float | None = text.get("final_logit_softcapping")
        self.scale = float(text.get("logit_scale") or 1.0) / float(text.get("logits_scaling") or 1.0)
        self.vocab_size = int(self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """The projection W [V, I]."""
        return self.projection.weight  # type: ignore[no-any-return]

    @property
    def is_trainable(self) -> bool:
        """Whether the projection, or a part of it, is trained."""
        return any(parameter.requires_grad for parameter in self.projection.parameters())

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, starts: DocumentStarts = ()) -> Tensor:
        """Last hidden states [B, T, I]."""
        options = self._document_kwargs(starts, input_ids)
        output = self.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _document_kwargs(self, starts: DocumentStarts, input_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments with which the attention kernel keeps documents apart."""
        return document_kwargs(self.decoder.config._attn_implementation, starts, input_ids)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., I]."""
        with self.unsharded():
            return self.scale_and_cap(self.project(hidden).float())[0]

    def unsharded(self) -> AbstractContextManager[None]:
        """A context in which the projection is all-gathered; nothing happens unless it is sharded."""
        return unsharded(self.projection)

    def logits_in_model_dtype(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] scaled and capped in the model's dtype, as inference servers do, returned in float32."""
        logits = self.project(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = tanh(logits / self.softcap) * self.softcap
        return logits.float()

    def project(self, hidden: Tensor) -> Tensor:
        """Projected hidden states, h W^T [..., V], in the projection's dtype."""
        # `forward`, not a call: a sharded head is all-gathered once for all chunks, without FSDP's hooks.
        return self.projection.forward(hidden)  # type: ignore[no-any-return]

    def scale_and_cap(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of a float32 projection, and the derivative of the soft cap, 1 - tanh^2 (None without a cap)."""
        if self.scale != 1.0:
            projected = projected * self.scale
        if not self.softcap:
            return projected, None
        capped = tanh(projected / self.softcap)
        return capped * self.softcap, 1 - capped**2

    def hidden_gradient(self, gradient: Tensor, cap_derivative: Tensor | None, buffer: Tensor) -> Tensor:
        """The gradient of hidden states [..., I] from that of the logits, which is overwritten.

        `buffer`: memory for the gradient in the projection's dtype.
        """
        if cap_derivative is not None:
            gradient *= cap_derivative
        if self.scale != 1.0:
            gradient *= self.scale
        return buffer.copy_(gradient) @ self.weight

    def chunk_rows(self) -> int:
        """Rows of hidden states whose float32 logits are computed at a time."""
        budget_bytes = LOGITS_CHUNK_BYTES.get(self.weight.device.type, LOGITS_CHUNK_BYTES["cuda"])
        return max(1, budget_bytes // (4 * self.vocab_size))
