"""Log-probabilities of all answers under the reference, computed once for a whole run."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from qlora.data.compared import Values, answer_counts
from qlora.data.types import Example
from qlora.distributed.processes import Processes
from qlora.training.objectives.comparison_step import ComparisonStep


@torch.no_grad()
def reference_values(
    step: ComparisonStep,
    examples: Sequence[Example],
    micro_batch: int,
    processes: Processes,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Values:
    """Values [S] of `examples`, split over the ranks: the sides of each, then its mismatched answers."""
    counts = list(answer_counts(examples))
    starts = np.cumsum([0, *(own + others for own, others in counts)])
    values = torch.zeros(int(starts[-1]), dtype=torch.float64)
    # Sequences of similar length share a batch, which saves padding.
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    rank_order = order[processes.rank :: processes.world_size]
    for start in range(0, -(-len(order) // processes.world_size), micro_batch):
        indices = rank_order[start : start + micro_batch]
        batch = step.collate([examples[index] for index in indices or order[:1]], 0).to(processes.device)
        # With FSDP a forward takes all ranks, also one that has no sequences left.
        parts = [step.reference_log_probs(part) for part in (batch, batch.mismatched) if part is not None]
        sizes = [[counts[index][kind] for index in indices] for kind in range(len(parts))]
        groups = [part.double().cpu().split(size) for part, size in zip(parts, sizes, strict=True) if indices]
        for number, index in enumerate(indices):
            values[starts[index] : starts[index + 1]] = torch.cat([group[number] for group in groups])
        progress(min(start + micro_batch, len(rank_order)), len(rank_order))
    return processes.sum(values.to(processes.device)).cpu().float().numpy()
