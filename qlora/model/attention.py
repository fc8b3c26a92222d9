"""Attention within documents: rows that hold several of them, each seeing only itself, without a T x T mask.

Registered with transformers under NAME. Where a padding mask comes along (generation), transformers' SDPA takes over.
"""

from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.model.cpu_attention import block_attention

varlen_attn: Any = None
with suppress(ImportError):  # torch before 2.10
    from torch.nn.attention.varlen import varlen_attn  # type: ignore[no-redef]

NAME = "qlora_documents"


@dataclass(frozen=True, eq=False)  # an object, so that a compiled layer looks at what it reads of it alone
class Documents:
    """Where documents begin in the rows of a micro-batch, known on the host so that no step waits for the device."""

    starts: tuple[tuple[int, ...], ...]  # of each row, 0 first
    cumulative: Tensor  # int32 [documents + 1], over all rows one after the other, on the device
    longest: int  # tokens


def documents_of(starts: tuple[tuple[int, ...], ...], length: int, device: torch.device) -> Documents:
    """The documents of rows of `length` tokens, each row cut at its `starts`; pads count to the last one."""
    ends = [row * length + start for row, cuts in enumerate(starts) for start in cuts] + [len(starts) * length]
    longest = max(after - before for before, after in pairwise(ends))
    return Documents(starts, torch.tensor(ends, dtype=torch.int32, device=device), longest)


def boundaries(attention: str, starts: tuple[tuple[int, ...], ...], ids: Tensor) -> dict[str, Any]:
    """What a model has to be told for `attention` to keep the documents of `ids` [B, T] apart; `starts`: of each row.

    Our own kernel takes the documents; FlashAttention takes running sums, for it reads them from the positions only
    where there is one row (transformers/modeling_flash_attention_utils.py, _is_packed_sequence). The masks of all other
    kernels are made from the positions.
    """
    if not starts or not (attention == NAME or "flash" in attention):
        return {}
    found = documents_of(starts, ids.shape[1], ids.device)
    if attention == NAME:
        return {"documents": found}
    sums, longest = found.cumulative, found.longest
    return {"cu_seq_lens_q": sums, "cu_seq_lens_k": sums, "max_length_q": longest, "max_length_k": longest}


def document_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention inside each document: query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D].

    `documents` absent: every row is one. `sliding_window`: tokens a query looks back on, itself included.
    """
    documents: Documents | None = options.pop("documents", None)
    dropout = options.get("dropout") or 0.0
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    window, scale = options.get("sliding_window"), options.get("scaling")
    if _can_vary(query, dropout):
        return _varlen(query, key, value, documents, scale, window), None
    if _in_blocks(query, dropout):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        ends = documents.cumulative if documents else None
        return block_attention(query, key, value, ends, window, scale), None
    cuts = documents.starts if documents else ((0,),) * len(query)
    if all(len(row) == 1 for row in cuts):
        return _causal(query, key, value, scale, window, dropout).transpose(1, 2), None
    rows = zip(query.split(1), key.split(1), value.split(1), cuts, strict=True)
    how = (scale, window, dropout)
    return torch.cat([_row(q, k, v, starts, how) for q, k, v, starts in rows]).transpose(1, 2), None


def no_mask(*sizes: Any, **options: Any) -> Tensor | None:
    """The mask that goes with it: none, unless padding or a cache asks for transformers' own."""
    padded = options.get("attention_mask") is not None
    return sdpa_mask(*sizes, **options) if padded or options.get("q_length") != options.get("kv_length") else None


def _row(query: Tensor, key: Tensor, value: Tensor, starts: tuple[int, ...], how: tuple[Any, ...]) -> Tensor:
    """One row, document by document: split, not sliced, since a slice's gradient is as large as the whole row."""
    sizes = [after - before for before, after in pairwise((*starts, query.shape[2]))]
    documents = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_causal(*document, *how) for document in documents], dim=2)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    near = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=near, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def _in_blocks(query: Tensor, dropout: float) -> bool:
    """Whether this is for our kernel: 16-bit training on a CPU. Elsewhere every bit is to be transformers'."""
    return query.device.type == "cpu" and query.dtype != torch.float32 and query.requires_grad and not dropout


def _can_vary(query: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length kernel takes this input."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return varlen_attn is not None and query.is_cuda and half and not dropout and query.shape[-1] <= 256


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, scale: float | None, window: int | None
) -> Tensor:
    """All documents of all rows in one kernel; [B, H, T, D] -> [B, T, H, D]."""
    rows, _, length, _ = query.shape
    documents = documents or documents_of(((0,),) * rows, length, query.device)
    flat = [tensor.transpose(1, 2).reshape(rows * length, tensor.shape[1], -1) for tensor in (query, key, value)]
    out = varlen_attn(
        *flat,
        documents.cumulative,
        documents.cumulative,
        documents.longest,
        documents.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.reshape(rows, length, query.shape[1], -1)  # type: ignore[no-any-return]


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, no_mask)
