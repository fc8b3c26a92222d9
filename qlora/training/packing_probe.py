"""Probes at the start: does packing keep documents apart, on this model and this attention kernel?"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qlora.data.batching.collate import collate
from qlora.data.types import Example
from qlora.errors import DataError
from qlora.training.loss import TokenLoss

PROBE_TOKENS = 48  # of each document: enough for a leak to show, nothing beside a step
# Of the logits' standard deviation. A leak moves logits by about one; rounding in 16 bit by a few hundredths.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def refuse_leaks(loss: TokenLoss, rows: Sequence[Example], dtype: torch.dtype, device: torch.device) -> float | None:
    """The largest logit difference of packed and lone documents, in standard deviations; None if nothing is packed.

    DataError if it is more than rounding: then packed rows would read each other.
    """
    packed = next((row for row in rows if len(row.starts()) > 1), None)
    if packed is None:
        return None
    difference = isolation_error(loss, packed, device)
    if not difference <= LIMITS[dtype]:
        raise DataError(
            f"data.packing: on this model and attention kernel packed documents see each other (logits move by "
            f"{difference:.2g} standard deviations). Set data.packing=false, or another model.attention."
        )
    return difference


@torch.no_grad()
def isolation_error(loss: TokenLoss, packed: Example, device: torch.device) -> float:
    """How far the logits of a packed row's documents are from those of each document alone."""
    ends = [*packed.starts(), len(packed)]
    spans = [slice(start, min(end, start + PROBE_TOKENS)) for start, end in pairwise(ends)][:4]
    alone = [Example(packed.where, packed.input_ids[span], packed.labels[span]) for span in spans]
    rows = [alone, alone[::-1]]  # a micro-batch of two rows with other boundaries: some kernels mix only these
    training = loss.training
    loss.eval()
    together = _logits(loss, [_joined(row) for row in rows], device).flatten(0, 1)
    apart = torch.cat([_logits(loss, [example], device)[0] for row in rows for example in row])
    loss.train(training)
    return float((together - apart).abs().max() / apart.std().clamp_min(1e-12))


def _joined(documents: Sequence[Example]) -> Example:
    """Documents one after the other in one row, as packing makes them."""
    lengths = np.cumsum([len(document) for document in documents])
    ids = np.concatenate([document.input_ids for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    return Example(documents[0].where, ids, labels, boundaries=tuple(int(end) for end in lengths[:-1]))


def _logits(loss: TokenLoss, rows: Sequence[Example], device: torch.device) -> Tensor:
    batch = collate(rows, pad_id=0).to(device)
    return loss.head(loss.head.hidden(batch.input_ids, batch.position_ids, batch.starts)).float()  # [B, T, V]
