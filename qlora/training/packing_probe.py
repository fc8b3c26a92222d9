"""Packing probe: before training, check that packed documents do not attend to each other on this model and kernel."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qlora.data.batching.collate import collate
from qlora.data.types import Example
from qlora.errors import DataError
from qlora.training.loss import TokenLoss

PROBE_TOKENS = 48  # of each document: enough to detect a leak, at a small fraction of a step's cost
# In standard deviations of the logits. A leak changes logits by about 1; 16-bit rounding by a few hundredths.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def refuse_leaks(
    loss: TokenLoss, sequences: Sequence[Example], dtype: torch.dtype, device: torch.device
) -> float | None:
    """The isolation error of a packed sequence; None if no sequence holds several documents.

    DataError if it exceeds rounding error: documents would then attend to each other.
    """
    packed = next((sequence for sequence in sequences if len(sequence.document_starts()) > 1), None)
    if packed is None:
        return None
    error = isolation_error(loss, packed, device)
    if not error <= LIMITS[dtype]:
        raise DataError(
            "data.packing: with this model and attention kernel packed documents attend to each other (logits change "
            f"by {error:.2g} standard deviations). Set data.packing=false, or another model.attention."
        )
    return error


@torch.no_grad()
def isolation_error(loss: TokenLoss, packed: Example, device: torch.device) -> float:
    """The largest logit difference of packed documents and the same documents alone, in standard deviations."""
    ends = [*packed.document_starts(), len(packed)]
    spans = [slice(start, min(end, start + PROBE_TOKENS)) for start, end in pairwise(ends)][:4]
    alone = [Example(packed.where, packed.input_ids[span], packed.labels[span]) for span in spans]
    # Two sequences with different boundaries: some kernels mix documents only across the sequences of a batch.
    orders = [alone, alone[::-1]]
    training = loss.training
    loss.eval()
    packed_logits = _logits(loss, [_joined(documents) for documents in orders], device).flatten(0, 1)
    separate_logits = torch.cat(
        [_logits(loss, [document], device)[0] for documents in orders for document in documents]
    )
    loss.train(training)
    return float((packed_logits - separate_logits).abs().max() / separate_logits.std().clamp_min(1e-12))


def _joined(documents: Sequence[Example]) -> Example:
    """Documents joined into one sequence, as packing does."""
    lengths = np.cumsum([len(document) for document in documents])
    ids = np.concatenate([document.input_ids for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    return Example(documents[0].where, ids, labels, boundaries=tuple(int(end) for end in lengths[:-1]))


def _logits(loss: TokenLoss, sequences: Sequence[Example], device: torch.device) -> Tensor:
    """[B, T, V] float32."""
    batch = collate(sequences, pad_id=0).to(device)
    hidden = loss.head.hidden_states(batch.input_ids, batch.position_ids, batch.document_starts, batch.lengths)
    return loss.head(hidden).float()
