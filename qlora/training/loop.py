"""The training loop: each optimizer step runs as many micro-batches as the global batch needs.

The loss is a sum over trained tokens divided by the trained tokens of the whole step on all ranks, so the split into
micro-batches and ranks does not change the result. Order, learning rate and dropout are pure functions of (seed, step).
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from qlora.adapters.step_casts import casts_kept
from qlora.data.batching.collate import Batch
from qlora.data.batching.sampler import lengths_of, micro_batches, split_across_ranks
from qlora.training.after_step import (
    advance,
    evaluate_if_due,
    is_due,
    log_steps,
    save_if_due,
    stops_early,
)
from qlora.training.checkpoint import Position
from qlora.training.job import Job, StepResult
from qlora.training.loss import TokenLoss
from qlora.training.loss_scale import UNSCALED, unscale
from qlora.training.optimizers import scale_learning_rates
from qlora.training.overflow_map import first_overflow
from qlora.training.schedule import learning_rate_factor


def fit(job: Job, position: Position) -> Position:
    """Train from `position` to the last step. Stopped, after an exact checkpoint, on SIGINT or SIGTERM."""
    for next_position in passes(job, position):
        position = next_position
    return position


def passes(job: Job, position: Position) -> Iterator[Position]:
    """`fit` as a generator: yields after each step, before it is logged, and once more at the end; the last one counts.

    Between two yields other jobs may train on the same base model; a signal received there stops this job at its step.
    """
    position, stopping, window = *evaluate_if_due(job, position), list[StepResult]()
    if stopping:
        raise job.stop_signal.error(
            f"before step {position.step + 1}: nothing new to save; the same command starts it again"
        )
    while position.step < job.total_steps and not stops_early(job, position):
        window.append(_step(job, position))
        position = advance(position, window[-1])
        yield position
        if is_due(position.step, job.settings.log_every) or position.step == job.total_steps:
            position, window = log_steps(job, position, window), []
        position, stopping = evaluate_if_due(job, position)
        if stopping and window:
            position = log_steps(job, position, window)
        save_if_due(job, position, stopping)
        if stopping:
            folder = job.checkpoints.folder_of(position.step)
            raise job.stop_signal.error(f"saved in {folder}; the same command resumes it")
    if position.step < job.total_steps:
        better = "higher held-out accuracy" if job.settings.early_stop_on == "accuracy" else "lower held-out loss"
        job.log.print(f"no {better} in {job.settings.early_stop} evaluations: stopping early")
    yield position


def _step(job: Job, position: Position) -> StepResult:
    """One optimizer step."""
    started, step, scale = time.monotonic(), position.step, position.scale if job.scales_loss else UNSCALED
    indices = job.sampler.indices(job.train_examples, step)
    batches = list(_batches(job, indices))
    counts = job.processes.sum_counts(torch.tensor([batch.counts for batch in batches]).sum(0)).tolist()
    weight, tokens, trained_tokens, *_ = counts

    step_sums = job.oom_recovery.run(lambda: _gradients(job, step, batches, counts, scale.value))
    unscale(job.trainable.values(), scale.value)
    scale_learning_rates(job.optimizer, learning_rate_factor(job.optim, step, job.total_steps))
    norm = job.processes.clip(job.trainable.values(), job.optim.max_grad_norm)
    # In one copy: the host waits for a GPU once.
    grad_norm, loss, *others = torch.cat([norm.float()[None], job.processes.sum(step_sums).reshape(-1)]).tolist()
    where = [job.train_examples[index].where for index in indices]
    is_overflow = scale.is_overflow(grad_norm, loss)
    reason = scale.reason if is_overflow else _non_finite_reason(job, batches, loss)
    if not is_overflow and job.non_finite_guard.allows(grad_norm, loss, step + 1, where, reason):
        job.optimizer.step()
    else:
        job.log.print(f"step {step + 1}: {reason}; the step was skipped, nothing changed")
        loss, weight, trained_tokens, others = 0.0, 0, 0, [0.0] * len(others)
    job.optimizer.zero_grad(set_to_none=True)
    next_scale = scale.after(math.isfinite(grad_norm)) if job.scales_loss else None
    seconds = time.monotonic() - started
    return StepResult(loss, weight, trained_tokens, tokens, others, grad_norm, seconds, is_overflow, next_scale)


def _non_finite_reason(job: Job, batches: Sequence[Batch], loss: float) -> str:
    """What is not finite; where products are in float16, a forward is repeated to name the matrix."""
    reason = "loss or gradient is not finite"
    if not job.scales_loss or math.isfinite(loss):
        return reason
    model = cast(TokenLoss, job.processes.unwrap(job.model))
    path = first_overflow(model, [batch.to(job.processes.device) for batch in batches])
    return f"{reason} (first at {path}, whose values exceed float16)" if path else reason


def _gradients(job: Job, step: int, batches: Sequence[Batch], counts: Sequence[int], loss_scale: float) -> Tensor:
    """Compute the gradients of all micro-batches of a step; returns the sum of what `backward` returns."""
    step_sums = torch.zeros((), device=job.processes.device)
    with casts_kept(job.processes.device):
        if job.comparison is not None:
            job.comparison.start_step(batches, job.processes)
        for index, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(job.settings.seed, step, job.processes.rank, index))
            with job.processes.accumulating(job.model, last=index == len(batches) - 1):
                step_sums = step_sums + backward(job, batch, counts, loss_scale)
    return step_sums


def backward(job: Job, batch: Batch, counts: Sequence[int], loss_scale: float = 1.0) -> Tensor:
    """Add the gradients of one micro-batch, times `loss_scale`; returns its loss, a sum, or more sums after it.

    counts: those of the whole step, which divide. Its gradients are divided by `loss_scale` once all are there.
    """
    batch = batch.to(job.processes.device)
    sums = job.model(*batch.arguments) if job.comparison is None else job.comparison.sums(job.model, batch, counts)
    loss: Tensor = sums if job.comparison is None else sums[0]
    scaled = loss if loss_scale == 1.0 else loss * loss_scale
    job.processes.backward(scaled / max(1, counts[0]))
    return sums.detach()


def _batches(job: Job, indices: Sequence[int]) -> Iterator[Batch]:
    """The rank's micro-batches of a step; in place of an empty one a sequence without labels, so that all take part."""
    rank, sizes = job.processes.rank, job.micro_batch_sizes
    lengths = lengths_of(job.train_examples)[indices].tolist()
    rank_indices = split_across_ranks(indices, lengths, sizes)[rank]
    for group in micro_batches(rank_indices, len(indices), sizes[rank], sizes):
        batch = job.collate([job.train_examples[index] for index in group or indices[-1:]], 0)
        yield batch if group else batch.without_loss()


def dropout_seed(*key: int) -> int:
    """The seed of a micro-batch's dropout from (seed, step, rank, index): no random state has to be saved."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7])
