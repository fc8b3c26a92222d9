"""LM head: hidden states to logits, as many rows at a time as a memory budget allows.

logits = softcap * tanh(scale * (h W^T) / softcap)    h [..., I], W [V, I]; without a soft cap: scale * (h W^T)

Scale and cap are measured on the class's own forward (class_head.py); a class with any other head keeps that forward.
"""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn, tanh

from qlora.data.types import PLAIN_LAYOUT, Layout
from qlora.distributed.unshard import unsharded
from qlora.model.attention import DOCUMENT_ATTENTION, document_kwargs
from qlora.model.class_head import (
    ClassLogits,
    HeadFormula,
    accepted,
    configured_formula,
    exact,
    measure_formula,
    runs_class_forward,
)
from qlora.model.document_batches import batches_of
from qlora.model.linear_layers import is_plain_linear
from qlora.model.logits_chunk import LOGITS_CHUNK_BYTES
from qlora.model.module_tree import decoder_of
from qlora.model.recurrent_mixers import DocumentMixer, documents_apart, mixers_of
from qlora.model.rotary import DocumentRotary, lengths_from_starts

CLASS_COPIES = 4  # of the logits that a class's own forward may hold at a time


class Head:
    """Hidden states to logits as the model computes them: projection, scale, soft cap; or the class's own forward."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder: Any = decoder_of(model)
        self.projection: Any = model.get_output_embeddings()  # type: ignore[operator]
        whole: nn.Module = getattr(model, "whole_model", model)
        self.formula = _formula(whole, self.projection)  # None: the class's own forward computes the logits
        self.scale, self.softcap = self.formula or HeadFormula()
        self._class_logits = None if self.formula else ClassLogits(whole, decoder_of(whole))
        self._accepted = accepted(type(decoder_of(whole)).forward, position_ids=None, use_cache=None)
        self._rotary = [module for module in whole.modules() if isinstance(module, DocumentRotary)]
        self._mixers = mixers_of(whole)
        self.vocab_size = int(self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """The projection W [V, I]."""
        return self.projection.weight  # type: ignore[no-any-return]

    @property
    def needs_autograd(self) -> bool:
        """Whether gradients take autograd: a part of the projection is trained, or the class's forward is used."""
        is_trained = any(parameter.requires_grad for parameter in self.projection.parameters())
        return is_trained or self._class_logits is not None

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, layout: Layout = PLAIN_LAYOUT) -> Tensor:
        """Last hidden states [B, T, I] of documents and prefix trees."""
        starts, lengths, branches = layout
        options = document_kwargs(self.decoder.config._attn_implementation, starts, input_ids, branches)
        arguments = {"position_ids": position_ids, "use_cache": False}
        taken = {name: value for name, value in arguments.items() if name in self._accepted}
        for rotary in self._rotary:
            rotary.token_lengths = lengths_from_starts(starts, lengths, input_ids.shape[1]) if lengths else None
        batches = batches_of(layout, input_ids.shape[1], input_ids.device) if self._mixers else None
        with documents_apart(self._mixers, batches):
            output = self.decoder(input_ids=input_ids, **taken, **options)
        for rotary in self._rotary:
            rotary.token_lengths = None
        return output.last_hidden_state  # type: ignore[no-any-return]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., I]."""
        with self.unsharded():
            if self._class_logits is not None:
                return self._class_logits(hidden).float()
            return self.scale_and_cap(self.project(hidden).float())[0]

    def unsharded(self) -> AbstractContextManager[None]:
        """A context in which the projection is all-gathered; nothing happens unless it is sharded."""
        return unsharded(self.projection)

    def logits_in_model_dtype(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] scaled and capped in the model's dtype, as inference servers do, returned in float32."""
        if self._class_logits is not None:
            return self._class_logits(hidden).float()
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
        copies = 1 if self._class_logits is None else CLASS_COPIES
        return max(1, budget_bytes // (4 * self.vocab_size * copies))


def shares_prefixes(model: nn.Module) -> bool:
    """Whether a model trains prefix trees: by its attention kernel, without a state or frequencies of the length."""
    kernel = getattr(model.config, "_attn_implementation", None)
    whole_documents = (DocumentRotary, DocumentMixer)
    return kernel == DOCUMENT_ATTENTION and not any(isinstance(module, whole_documents) for module in model.modules())


def _formula(model: nn.Module, projection: nn.Module) -> HeadFormula | None:
    """Scale and soft cap of a model's logits; None if its class computes something else."""
    config = model.config.get_text_config().to_dict()  # type: ignore[operator, union-attr]
    configured = configured_formula(config)
    try:
        measured = measure_formula(model, decoder_of(model), projection)
    except Exception:  # a transform before the projection, in another dtype or of another width
        return None if runs_class_forward(model, decoder_of(model)) else configured
    kind: Any = type(projection)
    if measured is None or (isinstance(projection, nn.Linear) and not is_plain_linear(kind)):
        return None
    return exact(measured, config)
