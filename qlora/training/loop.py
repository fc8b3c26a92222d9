"""The loop: one pass is one optimizer step, which is as many micro-batches as the global batch needs.

The loss is a sum over trained tokens divided by the trained tokens of the whole step on all processes, so the split
into micro-batches and processes does not change the answer. Order, rate and dropout are pure functions of (seed, step).
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.sampler import Sampler, lengths_of, micro_batches, shares, steps_per_epoch
from qlora.data.types import Example
from qlora.distributed.processes import Processes
from qlora.errors import InputError
from qlora.memory.meter import peak_bytes
from qlora.training import SCHEDULES, Optim, Train
from qlora.training.checkpoint import Checkpoints, Position, Saved
from qlora.training.eval_loss import Evaluation, evaluate
from qlora.training.oom_recovery import OomRecovery, longest
from qlora.training.optimizers import set_factor
from qlora.training.run_log import Log
from qlora.training.schedule import rounded_up, warmup_steps
from qlora.training.signals import NonFiniteGuard, StopSignal


@dataclass(frozen=True)
class Job:
    """What the loop works on."""

    model: nn.Module  # a TokenLoss, wrapped by the strategy
    trainable: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    train: Sequence[Example]
    held_out: Sequence[Example]
    order: str  # of the rows in an epoch: data.order
    settings: Train
    optim: Optim
    steps: int
    processes: Processes
    sizes: Sequence[int]  # rows of a micro-batch, by process
    log: Log
    checkpoints: Checkpoints
    stop: StopSignal
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    relief: OomRecovery = field(default_factory=OomRecovery)

    @cached_property
    def row_order(self) -> Sampler:
        """Which rows a step sees."""
        return Sampler(self.order, self.settings.global_batch, self.settings.seed)


@dataclass(frozen=True)
class Step:
    """What one optimizer step did; `loss` is a sum over `trained_tokens`."""

    loss: float
    trained_tokens: int
    tokens: int  # without padding
    grad_norm: float
    seconds: float


def fit(job: Job, position: Position) -> Position:
    """Train from `position` to the last step. Stopped, after an exact checkpoint, on SIGINT or SIGTERM."""
    for passed in passes(job, position):
        position = passed
    return position


def passes(job: Job, position: Position) -> Iterator[Position]:
    """`fit` as a walk: pauses after each step, before it is logged, and once more at the end; the last one counts.

    In a pause others may step on the same base; a signal that comes there stops this run at the step it has taken.
    """
    position, stopping, window = *_evaluate_unless_stopping(job, position), list[Step]()
    if stopping:
        raise job.stop.error(f"before step {position.step + 1}: nothing new to save; the same command starts it again")
    while position.step < job.steps and not _no_longer_improves(job, position):
        window.append(_step(job, position.step))
        position = _after(position, window[-1])
        yield position
        if _due(position.step, job.settings.log_every) or position.step == job.steps:
            position, window = _log(job, position, window), []
        position, stopping = _evaluate_unless_stopping(job, position)
        if stopping and window:
            position = _log(job, position, window)
        _save_if_due(job, position, stopping)
        if stopping:
            raise job.stop.error(f"{job.checkpoints.folder_of(position.step)} holds it; the same command resumes it")
    if position.step < job.steps:
        job.log.say(f"no better held-out loss for {job.settings.early_stop} evaluations: the run ends here")
    yield position


def steps_of(settings: Train, rows: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, or the epochs' (a fraction of an epoch is rounded up)."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, rounded_up(settings.epochs * steps_per_epoch(rows, settings.global_batch)))


def factor_of(optim: Optim, step: int, steps: int) -> float:
    """The share of the peak learning rate that optimizer step `step` (from 0) learns with."""
    return float(SCHEDULES[optim.schedule](step, steps, warmup_steps(optim.warmup, steps)))


def dropout_seed(*place: int) -> int:
    """The seed of a micro-batch's dropout from (seed, step, rank, index): nothing random needs to be saved."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:7])


def rates_sha256(optim: Optim, taken: int, steps: int) -> str:
    """A digest of the rates that the first `taken` steps of `steps` learn with."""
    rates = [optim.learning_rate * factor_of(optim, step, steps) for step in range(taken)]
    return hashlib.sha256(repr(rates).encode()).hexdigest()


def refuse_other_rates(saved: Saved, optim: Optim, steps: int) -> None:
    """InputError if the steps already taken had other learning rates than this recipe would give them."""
    if saved.position.rates_sha256 != rates_sha256(optim, saved.position.step, steps):
        raise InputError(
            f"{saved.folder}: its {saved.position.step} steps were taken with other learning rates than this "
            "recipe gives them: optim.schedule, optim.warmup or the number of steps changed. Put them back, or set "
            "train.resume=never."
        )


def _step(job: Job, step: int) -> Step:
    """One optimizer step."""
    started = time.monotonic()
    rows = job.row_order.rows(job.train, step)
    batches = list(_batches(job, rows))
    counts = torch.tensor([[batch.trained_tokens, batch.tokens] for batch in batches]).sum(0)
    trained, tokens = (int(count) for count in job.processes.sum(counts.to(job.processes.device)))

    total = job.relief.run(lambda: _gradients(job, step, batches, trained))
    set_factor(job.optimizer, factor_of(job.optim, step, job.steps))
    grad_norm = float(job.processes.clip(job.trainable.values(), job.optim.max_grad_norm))
    loss = float(job.processes.sum(total))
    if job.guard.allows(grad_norm, loss, step + 1, [job.train[row].where for row in rows]):
        job.optimizer.step()
    else:
        job.log.say(f"step {step + 1}: loss or gradient not finite; the step was skipped, nothing changed")
        loss, trained = 0.0, 0
    job.optimizer.zero_grad(set_to_none=True)
    return Step(loss, trained, tokens, grad_norm, time.monotonic() - started)


def rehearse(job: Job, moment_bytes: int) -> None:
    """The longest micro-batch of the run, forward and backward, before the first step; changes nothing."""
    batch = longest(job.train, job.sizes[job.processes.rank]).to(job.processes.device)
    with job.processes.accumulating(job.model, last=False):
        job.relief.rehearse(lambda each: _backward(job, each, each.trained_tokens), batch, moment_bytes)


def _gradients(job: Job, step: int, batches: Sequence[Batch], trained: int) -> Tensor:
    """Gradients of all micro-batches of a step; returns their summed loss."""
    total = torch.zeros((), device=job.processes.device)
    for index, batch in enumerate(batches):
        torch.manual_seed(dropout_seed(job.settings.seed, step, job.processes.rank, index))
        with job.processes.accumulating(job.model, last=index == len(batches) - 1):
            total += _backward(job, batch, trained)
    return total


def _backward(job: Job, batch: Batch, trained: int) -> Tensor:
    """Gradients of one micro-batch; returns its summed loss."""
    batch = batch.to(job.processes.device)
    loss: Tensor = job.model(batch.input_ids, batch.labels, batch.position_ids, batch.starts)
    job.processes.backward(loss / max(1, trained))
    return loss.detach()


def _batches(job: Job, rows: Sequence[int]) -> Iterator[Batch]:
    """The process's micro-batches of a step; one without rows becomes a row without labels, so that all take part."""
    rank, sizes = job.processes.rank, job.sizes
    share = shares(rows, lengths_of(job.train)[rows].tolist(), sizes)[rank]
    for group in micro_batches(share, len(rows), sizes[rank], sizes):
        batch = collate([job.train[row] for row in group or rows[-1:]], pad_id=0)
        yield batch if group else batch.silent()


def _after(position: Position, taken: Step) -> Position:
    """The position one step on."""
    return replace(
        position,
        step=position.step + 1,
        skipped_steps=position.skipped_steps + (not taken.trained_tokens),
        open_loss=position.open_loss + taken.loss,
        open_trained_tokens=position.open_trained_tokens + taken.trained_tokens,
    )


def _log(job: Job, position: Position, window: Sequence[Step]) -> Position:
    """A line for the steps since the last one; `window` are those of this process's life, for the speed."""
    trained = position.open_trained_tokens
    loss = position.open_loss / trained if trained else None
    line = {
        "step": position.step,
        "epoch": _epoch(job, position),
        "loss": loss,
        "learning_rate": job.optim.learning_rate * factor_of(job.optim, position.step - 1, job.steps),
        "grad_norm": window[-1].grad_norm,
        "trained_tokens": trained,
        "tokens_per_second": sum(taken.tokens for taken in window) / max(1e-9, sum(taken.seconds for taken in window)),
        "peak_bytes": peak_bytes(job.processes.device),
    }
    if job.processes.is_main:
        job.log.train(line)
    return replace(position, loss=loss, open_loss=0.0, open_trained_tokens=0)


def _evaluate_unless_stopping(job: Job, position: Position) -> tuple[Position, bool]:
    """Evaluate if it is time and no signal has come; whether one has, before or while. Then the resumed run does it."""
    stopping = job.processes.any(job.stop.came)
    ends = position.step in (0, job.steps)
    due = job.held_out and position.evaluated_step != position.step
    if stopping or not due or not (ends or _due(position.step, job.settings.eval_every)):
        return position, stopping
    model = job.processes.bare(job.model)
    told = job.log.rates("evaluating")
    found = evaluate(model, job.held_out, min(job.sizes), job.processes, lambda: job.stop.came, told)
    if found is None:
        return position, True
    return _evaluated(job, position, found), job.processes.any(job.stop.came)


def _evaluated(job: Job, position: Position, found: Evaluation) -> Position:
    """The position with an evaluation remembered, and its line logged."""
    line = {"step": position.step, "eval_loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    line |= {"epoch": _epoch(job, position), "peak_bytes": peak_bytes(job.processes.device)}
    if job.processes.is_main:
        job.log.evaluation(line)
    finite = found.loss if math.isfinite(found.loss) else None
    position = replace(position, eval_loss=finite, evaluated_step=position.step)
    if finite is not None and (position.best_loss is None or finite < position.best_loss):
        return replace(position, best_loss=finite, best_step=position.step, evaluations_since_best=0)
    return replace(position, evaluations_since_best=position.evaluations_since_best + 1)


def _epoch(job: Job, position: Position) -> float:
    return position.step / steps_per_epoch(len(job.train), job.settings.global_batch)


def _save_if_due(job: Job, position: Position, stopping: bool) -> None:
    """A checkpoint every `save_every`, at the end, at the best evaluation of an early-stopped run, and on a signal."""
    settings = job.settings
    due = settings.save_every and (_due(position.step, settings.save_every) or position.step == job.steps)
    best = settings.early_stop and position.best_step == position.step
    if (stopping or due or best) and job.processes.writes:
        taken = replace(position, rates_sha256=rates_sha256(job.optim, position.step, job.steps))
        job.checkpoints.save(taken, job.optimizer, job.trainable)
    job.processes.wait()


def _no_longer_improves(job: Job, position: Position) -> bool:
    patience = job.settings.early_stop
    return patience is not None and position.evaluations_since_best >= patience


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
