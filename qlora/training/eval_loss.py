"""Evaluation: the mean loss per trained token over all sequences, independent of batch size and number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora.data.batching.collate import collate
from qlora.data.types import Example
from qlora.distributed.processes import Processes


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per trained token, in nats, and the number of sequences and trained tokens."""

    loss: float
    rows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that would overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    micro_batch: int,
    processes: Processes,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """The loss of `model` (a TokenLoss) over `examples`, which are split over the ranks.

    `should_stop` is called before every micro-batch; None if any rank stopped. `progress` gets the number of sequences
    done, and of all, on this rank.
    """
    training = model.training
    model.eval()
    # Sequences of similar length share a batch, which saves padding; the mean does not depend on it.
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    rank_order = order[processes.rank :: processes.world_size]
    total = torch.zeros(3, dtype=torch.float64, device=processes.device)
    for start in range(0, -(-len(order) // processes.world_size), micro_batch):
        if processes.any_if_sharded(should_stop()):
            total[2] = 1.0
            break
        indices = rank_order[start : start + micro_batch]
        batch = collate([examples[index] for index in indices or order[:1]], pad_id=0)
        if not indices:  # this rank has no sequences left, but with FSDP a forward takes all ranks
            batch = batch.without_loss()
        total[0] += model(*batch.to(processes.device).arguments).double()
        total[1] += batch.trained_tokens
        progress(min(start + micro_batch, len(rank_order)), len(rank_order))
    model.train(training)
    loss_sum, tokens, stopped = processes.sum(total).tolist()
    return None if stopped else Evaluation(loss_sum / max(1.0, tokens), len(examples), int(tokens))
