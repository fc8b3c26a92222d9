"""Cross entropy by autograd, logits recomputed chunk by chunk: for heads that train or keep a class's forward."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora.model.lm_head import Head


def checkpointed_loss(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Hidden [N, I], targets [N] -> float32 scalar, the sum over the targets."""
    rows = head.chunk_rows()
    total = 0.0 * hidden.sum().float()
    for start in range(0, len(targets), rows):
        chunk = hidden[start : start + rows], targets[start : start + rows]
        total = total + checkpoint(partial(_chunk_loss, head, "sum"), *chunk, use_reentrant=False)
    return total


def checkpointed_token_losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The same of each target, [N]."""
    rows = head.chunk_rows()
    losses = [0.0 * hidden[:0].sum(-1).float()]
    for start in range(0, len(targets), rows):
        chunk = hidden[start : start + rows], targets[start : start + rows]
        losses.append(checkpoint(partial(_chunk_loss, head, "none"), *chunk, use_reentrant=False))
    return torch.cat(losses)


def _chunk_loss(head: Head, reduction: str, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), targets, reduction=reduction)
