"""Packing probe: before training, check that documents and the branches of prefix trees see only what they should.

On the model and the attention kernel of the run, with tokens of the data.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qlora.data.batching.collate import collate
from qlora.data.prefix_tree import merge_paths, path_indices
from qlora.data.types import Example, Ints
from qlora.errors import DataError
from qlora.model.expert_forward import expert_stacks
from qlora.training.loss import TokenLoss

QUANTILE = 0.85  # of tokens, where single ones may differ
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


def refuse_tree_leaks(
    loss: TokenLoss, sequences: Sequence[Example], dtype: torch.dtype, device: torch.device
) -> float | None:
    """The isolation error of a small prefix tree; None if no sequence holds a tree. DataError as in `refuse_leaks`."""
    tree = next((sequence for sequence in sequences if sequence.branches), None)
    if tree is None:
        return None
    error = tree_error(loss, tree.input_ids, device)
    if not error <= LIMITS[dtype]:
        raise DataError(
            "data.train: with this model and attention kernel answers that share a prefix see each other (logits "
            f"change by {error:.2g} standard deviations). Set model.attention: sdpa: then each is a sequence alone."
        )
    return error


def isolation_error(loss: TokenLoss, packed: Example, device: torch.device) -> float:
    """The largest logit difference of packed documents and the same documents alone, in standard deviations."""
    ends = [*packed.document_starts(), len(packed)]
    spans = [slice(start, min(end, start + PROBE_TOKENS)) for start, end in pairwise(ends)][:4]
    alone = [Example(packed.where, packed.input_ids[span], packed.labels[span]) for span in spans]
    # Two sequences with different boundaries: some kernels mix documents only across the sequences of a batch.
    orders = [alone, alone[::-1]]
    apart = [[document] for documents in orders for document in documents]
    return _largest_difference(loss, [_joined(documents) for documents in orders], apart, device)


def tree_error(loss: TokenLoss, ids: Ints, device: torch.device) -> float:
    """The same of a small tree of tokens in `ids`: a branch of the trunk, and one of that branch."""
    distinct, half = np.unique(ids), PROBE_TOKENS // 2
    trunk = np.resize(ids, PROBE_TOKENS)
    branch = np.concatenate([trunk[:half], np.resize(distinct[distinct != trunk[half]], half)])
    fork = half + half // 3
    twig = np.concatenate([branch[:fork], np.resize(distinct[distinct != branch[fork]], half // 2)])
    tree = merge_paths("probe", [(path, path) for path in (trunk, branch, twig)])
    paths = path_indices(tree)
    apart = [[Example("probe", tree.input_ids[path], tree.labels[path])] for path in paths]
    return _largest_difference(loss, [tree], apart, device, np.concatenate(paths))


@torch.no_grad()
def _largest_difference(
    loss: TokenLoss,
    together: Sequence[Example],
    apart: Sequence[Sequence[Example]],
    device: torch.device,
    order: Ints | None = None,
) -> float:
    """Logits of sequences in one batch against those of several batches. order: tokens of the first to be compared."""
    training = loss.training
    loss.eval()
    logits = _logits(loss, together, device).flatten(0, 1)
    logits = logits if order is None else logits[torch.from_numpy(order).long().to(device)]
    expected = torch.cat([_logits(loss, batch, device)[0] for batch in apart])
    loss.train(training)
    return _difference(loss, logits - expected) / max(float(expected.std()), 1e-12)


def _difference(loss: TokenLoss, difference: Tensor) -> float:
    """The largest value of [N, V]; with experts in 16 bits, the root mean square of one token in seven.

    Rounding can change which of two experts of nearly equal weight a token visits; a leak changes a third of them.
    """
    model = loss.model
    if expert_stacks(model) and model.get_input_embeddings().weight.dtype != torch.float32:  # type: ignore[operator]
        return float(difference.float().square().mean(-1).quantile(QUANTILE).sqrt())
    return float(difference.abs().max())


def _joined(documents: Sequence[Example]) -> Example:
    """Documents joined into one sequence, as packing does."""
    lengths = np.cumsum([len(document) for document in documents])
    ids = np.concatenate([document.input_ids for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    return Example(documents[0].where, ids, labels, boundaries=tuple(int(end) for end in lengths[:-1]))


def _logits(loss: TokenLoss, sequences: Sequence[Example], device: torch.device) -> Tensor:
    """[B, T, V] float32."""
    batch = collate(sequences, pad_id=0).to(device)
    hidden = loss.head.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
    return loss.head(hidden).float()
