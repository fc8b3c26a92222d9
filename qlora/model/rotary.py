"""Rotary embeddings whose frequencies depend on the length: chosen for each document by its own length.

transformers chooses by the longest sequence of a batch and keeps the choice in buffers (LongRoPE, dynamic NTK). Here
the class's own forward runs once for each choice that a micro-batch needs, and its state is restored afterwards: a
document gets what transformers gives it alone, whichever documents share its micro-batch, and no frozen byte changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora.model.module_tree import set_by_path

LONGROPE, DYNAMIC = "longrope", "dynamic"
STATE = ("max_seq_len_cached", "attention_scaling")  # attributes that a forward may change, beside buffers


class DocumentRotary(nn.Module):
    """A rotary embedding with the frequencies of each document's length."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = original
        self.token_lengths: Tensor | None = None  # [B, T] on the CPU: tokens of each token's document; set by the head

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What the original returns (cos and sin), for positions [B, T]."""
        options = {} if layer_type is None else {"layer_type": layer_type}
        limit = _limit(self.original, layer_type)
        if limit is None or position_ids.dim() != 2:
            return self.original(x, position_ids, **options)
        lengths = self.token_lengths
        if lengths is None or lengths.shape != position_ids.shape:
            lengths = lengths_from_positions(position_ids.cpu())
        choices = lengths.where(lengths > limit[0], 0)
        if limit[1] == LONGROPE:
            choices = choices.clamp(max=limit[0] + 1)  # all lengths above the limit have the same frequencies
        results = []
        with _restored(self.original):
            for choice in choices.unique().tolist():
                chosen = (choices == choice).to(position_ids.device)
                # Positions of padding, and of other choices, must not decide.
                own = position_ids.minimum((lengths - 1).to(position_ids.device)).where(chosen, 0)
                results.append((chosen, self.original(x, own, **options)))
        return _merged(results)


def lengths_from_positions(position_ids: Tensor) -> Tensor:
    """Tokens of each token's document [B, T], where positions restart at every document and nothing is padded."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    document = starts.long().cumsum(1) - 1
    ends = torch.zeros_like(position_ids).scatter_reduce(1, document, position_ids, "amax")
    return ends.gather(1, document) + 1


def lengths_from_starts(starts: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> Tensor:
    """The same of padded sequences with known document starts and lengths; padding belongs to the last document."""
    result = torch.empty(len(starts), width, dtype=torch.long)
    for row, (begins, length) in enumerate(zip(starts, lengths, strict=True)):
        for begin, end in zip(begins, (*begins[1:], length), strict=True):
            result[row, begin:] = end - begin
    return result


def replace_length_dependent_rotary(model: nn.Module) -> int:
    """Wrap every rotary embedding whose frequencies depend on the length; returns how many."""
    paths = [path for path, module in model.named_modules() if length_limits(module)]
    for path in paths:
        set_by_path(model, path, DocumentRotary(model.get_submodule(path)))
    return len(paths)


def length_limits(module: nn.Module) -> dict[int, str]:
    """Length in tokens above which other frequencies are used -> kind; empty if they never change."""
    kinds = getattr(module, "rope_type", None)
    types = [None] if isinstance(kinds, str) else list(kinds) if isinstance(kinds, Mapping) else []
    return dict(limit for name in types if (limit := _limit(module, name)))


def describe_lengths(model: nn.Module, max_length: int) -> str | None:
    """A line about which lengths have which rotary frequencies; None if all up to `max_length` have the same."""
    limits = {limit: kind for module in model.modules() for limit, kind in length_limits(module).items()}
    limits = {limit: kind for limit, kind in limits.items() if limit < max_length}
    if not limits:
        return None
    limit, kind = min(limits.items())
    factors = "LongRoPE's long factors" if kind == LONGROPE else "rotary frequencies scaled to their length"
    return (
        f"documents above {limit:,} tokens have {factors}, shorter ones those of the original context: each document "
        "by its own length, as transformers gives them one by one"
    )


def _limit(original: Any, layer_type: str | None) -> tuple[int, str] | None:
    kind = original.rope_type if layer_type is None else original.rope_type[layer_type]
    if DYNAMIC in kind:
        return int(original.original_max_seq_len), DYNAMIC
    if kind != LONGROPE:
        return None
    settings = original.config.rope_parameters
    settings = settings if layer_type is None else settings[layer_type]
    return int(settings["original_max_position_embeddings"]), LONGROPE


@contextmanager
def _restored(original: Any) -> Iterator[None]:
    """Restore buffers and lengths that a forward changes."""
    buffers = {name: (buffer, buffer.clone()) for name, buffer in original._buffers.items() if buffer is not None}
    names = [name for name in vars(original) if name.endswith(STATE)]
    state = {name: getattr(original, name) for name in names}
    try:
        yield
    finally:
        for name, (buffer, values) in buffers.items():
            original._buffers[name] = buffer.copy_(values)
        for name, value in state.items():
            setattr(original, name, value)


def _merged(results: Sequence[tuple[Tensor, Any]]) -> Any:
    """For each token the result of its own choice; a result is one tensor or several, [B, T, ...]."""
    (_, merged), *others = results
    for chosen, result in others:
        if isinstance(result, Tensor):
            merged = _select(chosen, result, merged)
        else:
            merged = type(merged)(_select(chosen, new, old) for new, old in zip(result, merged, strict=True))
    return merged


def _select(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(chosen[(..., *[None] * (new.dim() - chosen.dim()))], new, old)
