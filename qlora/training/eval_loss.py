"""Evaluation: the mean loss over trained tokens of all rows, whatever the batch size or the number of processes."""

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
    """Mean loss per trained token, in nats; rows and tokens that went into it."""

    loss: float
    rows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite rather than an overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    micro_batch: int,
    processes: Processes,
    give_up: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """The token-weighted loss of `model` (a TokenLoss) over `examples`; each process takes its share of the rows.

    `give_up` is asked before every micro-batch; None if any process gave up. `progress` is told rows done and rows.
    """
    training = model.training
    model.eval()
    # Rows of like length share a batch, so that padding costs little; the mean does not depend on it.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    mine = order[processes.rank :: processes.world]
    total = torch.zeros(3, dtype=torch.float64, device=processes.device)
    for start in range(0, -(-len(order) // processes.world), micro_batch):
        if processes.agreed(give_up()):
            total[2] = 1.0
            break
        rows = mine[start : start + micro_batch]
        batch = collate([examples[row] for row in rows or order[:1]], pad_id=0).to(processes.device)
        if not rows:  # this process has had all of its own, but a forward may take them all
            batch = batch.silent()
        total[0] += model(batch.input_ids, batch.labels, batch.position_ids, batch.starts).double()
        total[1] += batch.trained_tokens
        progress(min(start + micro_batch, len(mine)), len(mine))
    model.train(training)
    loss_sum, tokens, given_up = processes.sum(total).tolist()
    return None if given_up else Evaluation(loss_sum / max(1.0, tokens), len(examples), int(tokens))
