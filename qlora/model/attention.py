"""Attention within documents: packed sequences whose documents see only themselves, without a T x T mask.

    O_i = sum_j softmax_j(Q_i K_j^T * scale) V_j    over j <= i in the document of i, and i - j < sliding window

In a document that is a prefix tree, j are the ancestors of i, and the window counts positions.

Registered with transformers as DOCUMENT_ATTENTION. With a padding mask or a KV cache (generation), transformers' own
SDPA attention is called.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.data.types import Branch
from qlora.model.cpu_attention import block_attention
from qlora.model.kernel_watch import Watch, record_call, record_mask
from qlora.model.path_keys import SegmentBounds, SegmentContexts, contexts_on_device
from qlora.model.segment_masks import flat_segments
from qlora.model.sequence_segments import SegmentsBySequence, lengths_of_segments, segments_of_sequences, with_contexts
from qlora.model.sink_attention import Visible, masked_sink_attention, sink_attention
from qlora.model.varlen_attention import attention_with_contexts, takes, varlen_attention
from qlora.utils.send import send

DOCUMENT_ATTENTION = "qlora_documents"

Starts = tuple[tuple[int, ...], ...]  # of the documents of each sequence
BranchesBySequence = tuple[tuple[Branch, ...], ...]


@dataclass(frozen=True, eq=False)  # eq=False: torch.compile guards only on the fields that a layer reads
class Documents:
    """The segments of the sequences of a micro-batch. Known on the host: no step waits for the device."""

    segments: SegmentsBySequence  # per sequence, the first starts at 0
    cu_seqlens: Tensor  # int32 [segments + 1]: bounds in the concatenated sequences, on the device
    max_length: int  # tokens of the longest segment
    flat_segments: Tensor | None = None  # on a CPU, int64 [segments, 2]: start and parent in the concatenated sequences
    contexts: SegmentContexts | None = None  # the keys of each segment, where a segment sees more than itself


def documents_of(starts: Starts, length: int, device: torch.device, branches: BranchesBySequence = ()) -> Documents:
    """The documents of sequences of `length` tokens that start at `starts`; padding belongs to the last segment."""
    segments = segments_of_sequences(starts, branches)
    bounds = [index * length + segment.start for index, sequence in enumerate(segments) for segment in sequence]
    bounds.append(len(segments) * length)
    max_length = max(after - before for before, after in pairwise(bounds))
    contexts = contexts_on_device(segments, length, device) if any(branches) else None
    flat = flat_segments(segments, length) if device.type == "cpu" else None
    return Documents(segments, send(torch.tensor(bounds, dtype=torch.int32), device), max_length, flat, contexts)


def document_kwargs(attention: str, starts: Starts, ids: Tensor, branches: BranchesBySequence = ()) -> dict[str, Any]:
    """Keyword arguments with which `attention` keeps the documents of `ids` [B, T] apart; `starts`: per sequence.

    DOCUMENT_ATTENTION takes `documents`. FlashAttention takes cumulative lengths: it derives them from the positions
    only in a batch of one sequence (transformers/modeling_flash_attention_utils.py, _is_packed_sequence). All other
    kernels get a mask that transformers builds from the positions. ValueError for branches with another kernel.
    """
    if any(branches) and attention != DOCUMENT_ATTENTION:
        raise ValueError(f"{attention} does not take prefix trees")
    if not starts or not (attention == DOCUMENT_ATTENTION or "flash" in attention):
        return {}
    documents = documents_of(starts, ids.shape[1], ids.device, branches)
    if attention == DOCUMENT_ATTENTION:
        return {"documents": documents}
    bounds, longest = documents.cu_seqlens, documents.max_length
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def document_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention inside each document: query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D].

    `documents` absent: every sequence is one document. `sliding_window`: keys that a query sees, its own included.
    """
    if Watch.current is not None:
        record_call(options)
    documents: Documents | None = options.pop("documents", None)
    dropout = options.get("dropout") or 0.0
    if options.get("s_aux") is not None:
        return _sink_attention((query, key, value), attention_mask, documents, options), None
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    window, scale = options.get("sliding_window"), options.get("scaling")
    if query.is_cuda and takes(query, dropout, with_context=documents is not None and documents.contexts is not None):
        return _varlen_attention(query, key, value, documents, scale, window), None
    if _use_cpu_kernel(query, dropout):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return block_attention(query, key, value, documents.flat_segments if documents else None, window, scale), None
    if documents is None or all(len(segments) == 1 for segments in documents.segments):
        return _causal_attention(query, key, value, scale, window, dropout).transpose(1, 2).contiguous(), None
    sequences = zip(query.split(1), key.split(1), value.split(1), documents.segments, strict=True)
    settings = (scale, window, dropout)
    output = torch.cat([_by_segment(q, k, v, segments, settings) for q, k, v, segments in sequences])
    return output.transpose(1, 2).contiguous(), None  # as transformers' own kernels: some classes take a view


def document_mask(*sizes: Any, **options: Any) -> Tensor | None:
    """The mask function of DOCUMENT_ATTENTION: no mask, or transformers' SDPA mask for padding or a KV cache."""
    padded = options.get("attention_mask") is not None
    if Watch.current is not None:
        record_mask(sdpa_mask(*sizes, **{**options, "allow_is_causal_skip": False}), options)
    return sdpa_mask(*sizes, **options) if padded or options.get("q_length") != options.get("kv_length") else None


def _sink_attention(
    inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, documents: Documents | None, options: Mapping[str, Any]
) -> Tensor:
    """Attention of query, key and value with a logit of no value in every softmax."""
    (query, key, _), sinks = inputs, options["s_aux"]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if mask is not None or query.shape[2] != key.shape[2]:
        return masked_sink_attention(inputs, sinks, mask, scale)
    segments = documents.segments if documents else ((Branch(0, -1),),) * len(query)
    visible = Visible(segments, options.get("sliding_window"), scale)
    if options.get("dropout"):
        return masked_sink_attention(inputs, sinks, visible.mask(query), scale, options["dropout"])
    return sink_attention(*inputs, sinks, visible)


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Branch, ...], settings: tuple[Any, ...]
) -> Tensor:
    """One sequence, segment by segment. Split, not sliced: a slice's gradient is as large as the whole sequence."""
    length = query.shape[2]
    queries = query.split(lengths_of_segments(segments, length), dim=2)
    keys, values = (with_contexts(tensor, segments) for tensor in (key, value))
    return torch.cat(
        [_causal_attention(*segment, *settings) for segment in zip(queries, keys, values, strict=True)], dim=2
    )


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    """The last key is that of the last query: each query sees the keys up to its own."""
    (queries, length), grouped = (query.shape[2], key.shape[2]), query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu":  # only FlashAttention takes grouped heads, and it is not used here
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    if queries == length and (window is None or window >= length):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = torch.ones(queries, length, dtype=torch.bool, device=query.device).tril(length - queries)
    mask = mask if window is None else mask.triu(length - queries + 1 - window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def _use_cpu_kernel(query: Tensor, dropout: float) -> bool:
    """Whether `block_attention` runs: 16-bit training on a CPU. Elsewhere results equal transformers' bit for bit."""
    return query.device.type == "cpu" and query.dtype != torch.float32 and query.requires_grad and not dropout


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, scale: float | None, window: int | None
) -> Tensor:
    """All segments of all sequences in one kernel; [B, H, T, D] -> [B, T, H, D]."""
    batch, _, length, _ = query.shape
    documents = documents or documents_of(((0,),) * batch, length, query.device)
    flat = [tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], -1) for tensor in (query, key, value)]
    bounds = SegmentBounds(documents.cu_seqlens, documents.max_length)
    if documents.contexts is None:
        out = varlen_attention(flat, bounds, bounds, scale, window)
    else:
        out = attention_with_contexts(flat, bounds, documents.contexts, scale, window)
    return out.reshape(batch, length, query.shape[1], -1)


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, document_mask)
