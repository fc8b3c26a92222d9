"""A model with its cache: a batch of prompts, then one token a row at a time, without computing earlier tokens again.

The class makes its own cache, with a layer of each kind that it needs: keys and values, those of a sliding window, the
state of a recurrence. Only the names by which a forward takes and returns it differ between classes and versions of
transformers. A long prompt is computed a piece at a time, so that neither its scores nor its mask grow with its square.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora.model.recurrent_mixers import mixers_of, recurrent_mixers
from qlora.model.rotary import DocumentRotary

# Of the cache: in transformers 5.24, in 5.17, and of state-space models there. Without it a model computes all again.
NAMES = ("cache", "past_key_values", "cache_params")
# Families in which padding on the left changes an answer; the prompts of their batches have one length.
UNPADDED = frozenset({"dory", "falcon_mamba", "git", "mamba", "recurrent_gemma", "xlstm"})
# Whose cache takes several tokens wrongly in some releases of transformers (5.17 among them).
WHOLE_PROMPTS = frozenset({"big_bird", "megatron-bert", "moshi", "rembert"})
MANY_HEADS = 64  # of a configuration that does not say how many
PREFILL_SCORES = 2**28  # of a layer's attention in one forward: 1 GiB in float32, where a kernel keeps them


def takes_padding(model: Any) -> bool:
    """Whether prompts of different lengths can share a batch, padded on the left, without changing any of them."""
    names = _parameters(model)
    has_positions = "position_ids" in names or bool(mixers_of(model))  # a recurrence has none
    return "attention_mask" in names and has_positions and _family(model) not in UNPADDED


def _family(model: Any) -> str:
    return str(getattr(model.config.get_text_config(), "model_type", ""))


class CachedModel:
    """The forward of a model over a batch of rows that grow by a token at a time, padded on the left."""

    def __init__(self, model: Any, prefill_scores: int = PREFILL_SCORES) -> None:
        self._model = model
        self._prefill_scores = prefill_scores
        self._names = _parameters(model)
        self._cache_name = next((name for name in NAMES if name in self._names), None)
        self._heads = getattr(model.config.get_text_config(), "num_attention_heads", None) or MANY_HEADS
        continues = self._cache_name is not None and takes_padding(model) and not recurrent_mixers(model)
        self._continues = continues and _family(model) not in WHOLE_PROMPTS
        self._rotary = [module for module in model.modules() if isinstance(module, DocumentRotary)]
        self._cache: Any = None
        self._ids = self._mask = torch.empty(0)
        self._is_padded = False

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Float32 logits [B, V] of the token after each prompt; starts a new batch."""
        width, device = max(map(len, prompts)), self._model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        self._cache, self._is_padded = None, not bool(mask.all())
        self._ids, self._mask = ids.to(device), mask.to(device)
        for piece in self._pieces():
            logits = self._forward(self._ids[:, piece], piece.stop)
        return logits

    def append(self, tokens: Sequence[int]) -> Tensor:
        """Float32 logits [B, V] of the token after those of `tokens`, of which each row gets one."""
        column = torch.tensor(tokens, device=self._ids.device)[:, None]
        self._ids = torch.cat([self._ids, column], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(column)], dim=1)
        return self._forward(self._ids if self._cache is None else column, self._ids.shape[1])

    def keep(self, rows: Sequence[int]) -> bool:
        """Continue with these rows only; False, and nothing changes, if the class's cache can't leave out rows."""
        if self._cache is not None and not hasattr(self._cache, "reorder_cache"):
            return False
        index = torch.tensor(list(rows), device=self._ids.device)
        self._ids, self._mask = self._ids[index], self._mask[index]
        if self._cache is not None:
            self._cache.reorder_cache(index)
        return True

    def _pieces(self) -> list[slice]:
        """The columns of the prompts that one forward computes; all, where the class can't continue with several."""
        rows, width = self._ids.shape
        step = max(1, self._prefill_scores // (rows * self._heads * width)) if self._continues else width
        return [slice(first, min(first + step, width)) for first in range(0, width, step)]

    def _forward(self, ids: Tensor, end: int) -> Tensor:
        """The logits after the columns up to `end`, of which `ids` are the last."""
        mask = self._mask[:, :end]
        options = {
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            "attention_mask": mask if self._is_padded else None,
            "use_cache": self._cache_name is not None,
            "logits_to_keep": 1,
        }
        if self._cache_name is not None:
            options[self._cache_name] = self._cache
        for rotary in self._rotary:  # frequencies by the length of the row, not of the longest one
            rotary.token_lengths = self._mask.sum(1, keepdim=True).expand(ids.shape).cpu()
        output = self._model(input_ids=ids, **{name: value for name, value in options.items() if name in self._names})
        for rotary in self._rotary:
            rotary.token_lengths = None
        if self._cache_name is not None:
            self._cache = getattr(output, self._cache_name, None)
        return output.logits[:, -1].float()  # type: ignore[no-any-return]


def _parameters(model: Any) -> set[str]:
    return {*inspect.signature(type(model).forward).parameters}
