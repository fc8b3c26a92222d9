"""Evaluation: the mean loss per trained token over all sequences, independent of batch size and number of ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batching.collate import Batch, collate
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

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """What is logged beside the loss."""
        return {"perplexity": self.perplexity}


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

    def measure(batch: Batch) -> Tensor:
        loss: Tensor = model(*batch.to(processes.device).arguments).double()
        return torch.stack([loss, torch.full_like(loss, batch.trained_tokens)])

    if not examples:
        return Evaluation(0.0, 0, 0)
    evaluation_pass = EvaluationPass(model, examples, micro_batch, processes, should_stop, progress)
    sums = evaluation_pass.sum(measure, collate)
    return None if sums is None else Evaluation(sums[0] / max(1.0, sums[1]), len(examples), int(sums[1]))


@dataclass(frozen=True)
class EvaluationPass:
    """One pass over examples, which are split over the ranks; its arguments are those of `evaluate`."""

    model: nn.Module
    examples: Sequence[Example]
    micro_batch: int
    processes: Processes
    should_stop: Callable[[], bool]
    progress: Callable[[int, int], None]

    @torch.no_grad()
    def sum(
        self, measure: Callable[[Any], Tensor], collate: Callable[[Sequence[Example], int], Batch]
    ) -> list[float] | None:
        """The sums over all ranks of what `measure` returns for each micro-batch, float64 [K]; None if stopped."""
        examples, processes, training = self.examples, self.processes, self.model.training
        self.model.eval()
        # Sequences of similar length share a batch, which saves padding; the mean does not depend on it.
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
        rank_order = order[processes.rank :: processes.world_size]
        total, stopped = torch.zeros((), dtype=torch.float64, device=processes.device), False
        for start in range(0, -(-len(order) // processes.world_size), self.micro_batch):
            stopped = processes.any_if_sharded(self.should_stop())
            if stopped:
                break
            indices = rank_order[start : start + self.micro_batch]
            batch = collate([examples[index] for index in indices or order[:1]], 0)
            if not indices:  # this rank has no sequences left, but with FSDP a forward takes all ranks
                batch = batch.without_loss()
            total = total + measure(batch)
            self.progress(min(start + self.micro_batch, len(rank_order)), len(rank_order))
        self.model.train(training)
        return None if processes.any(stopped) else processes.sum(total).tolist()
