"""The loop: one pass is one optimizer step, which is as many micro-batches as the global batch needs.

The loss is a sum over trained tokens divided by the trained tokens of the whole step on all processes, so the split
into micro-batches and processes does not change the answer. Order, rate and dropout are pure functions of (seed, step).
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qlora.data.batches import Batch, collate, micro_batches, rows_of_step, steps_per_epoch
from qlora.data.types import Example
from qlora.distributed.processes import Processes
from qlora.errors import InputError, QloraError
from qlora.memory.meter import peak_bytes
from qlora.train import SCHEDULES, Optim, Train
from qlora.train.checkpoint import Checkpoints, Position, Saved
from qlora.train.evaluate import Evaluation, evaluate
from qlora.train.guard import FiniteGuard, StopSignal
from qlora.train.log import Log
from qlora.train.optim import set_factor
from qlora.train.schedule import warmup_steps


@dataclass(frozen=True)
class Job:
    """What the loop works on."""

    model: nn.Module  # a TokenLoss, wrapped by the strategy
    trainable: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    train: Sequence[Example]
    held_out: Sequence[Example]
    settings: Train
    optim: Optim
    steps: int
    processes: Processes
    log: Log
    checkpoints: Checkpoints
    stop: StopSignal
    guard: FiniteGuard = field(default_factory=FiniteGuard)


@dataclass(frozen=True)
class Step:
    """What one optimizer step did; `loss` is a sum over `trained_tokens`."""

    loss: float
    trained_tokens: int
    tokens: int  # without padding
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """How the run ended."""

    position: Position
    loss: float | None  # of the last logged step, per trained token
    evaluation: Evaluation | None
    skipped_steps: int


def fit(job: Job, position: Position) -> Fitted:
    """Train from `position` to the last step. Stopped, after an exact checkpoint, on SIGINT or SIGTERM."""
    evaluation, loss, skipped, window = None, None, 0, list[Step]()
    if job.processes.any(job.stop.number is not None):
        raise job.stop.error(
            f"before step {position.step + 1}, so there is nothing new to save; the same command starts it"
        )
    if job.held_out and position.step == 0:
        position, evaluation = _evaluate(job, position)
    for step in range(position.step, job.steps):
        taken = _step(job, step)
        skipped += not taken.trained_tokens
        window.append(taken)
        position = replace(position, step=step + 1)
        if _due(position.step, job.settings.log_every) or position.step == job.steps:
            loss = _log(job, position.step, window)
            window = []
        if job.held_out and (_due(position.step, job.settings.eval_every) or position.step == job.steps):
            position, evaluation = _evaluate(job, position)
        _save_or_stop(job, position)
        if _no_longer_improves(job, position):
            job.log.say(f"no better held-out loss for {job.settings.early_stop} evaluations: the run ends here")
            break
    return Fitted(position, loss, evaluation, skipped)


def steps_of(settings: Train, rows: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, or the epochs' (a fraction of an epoch is rounded up)."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, -int(-(settings.epochs or 1) * steps_per_epoch(rows, settings.global_batch) // 1))


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
    rows = rows_of_step(len(job.train), job.settings.global_batch, job.settings.seed, step)
    batches = list(_batches(job, rows))
    counts = torch.tensor([[batch.trained_tokens, batch.tokens] for batch in batches]).sum(0)
    trained, tokens = (int(count) for count in job.processes.sum(counts.to(job.processes.device)))

    total = torch.zeros((), device=job.processes.device)
    for index, batch in enumerate(batches):
        torch.manual_seed(dropout_seed(job.settings.seed, step, job.processes.rank, index))
        with job.processes.accumulating(job.model, last=index == len(batches) - 1):
            total += _backward(job, batch, trained)

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


def _backward(job: Job, batch: Batch, trained: int) -> Tensor:
    """Gradients of one micro-batch; returns its summed loss."""
    batch = batch.to(job.processes.device)
    try:
        loss: Tensor = job.model(batch.input_ids, batch.labels, batch.position_ids, batch.starts)
        job.processes.backward(loss / max(1, trained))
    except torch.OutOfMemoryError as error:
        raise QloraError(
            f"out of memory on a micro-batch of {list(batch.input_ids.shape)} rows x tokens. The same training "
            "fits with a smaller train.micro_batch (the result does not change), memory.recompute=all, or a shorter "
            "data.max_length."
        ) from error
    return loss.detach()


def _batches(job: Job, rows: Sequence[int]) -> Iterator[Batch]:
    """The process's micro-batches of a step; one without rows becomes a row without labels, so that all take part."""
    shares = micro_batches(rows, job.settings.micro_batch, job.processes.rank, job.processes.world)
    for share in shares:
        batch = collate([job.train[row] for row in share or rows[:1]], pad_id=0)
        yield batch if share else batch.silent()


def _log(job: Job, step: int, window: Sequence[Step]) -> float | None:
    """A line for the steps since the last one; returns their loss per trained token."""
    trained = sum(taken.trained_tokens for taken in window)
    loss = sum(taken.loss for taken in window) / trained if trained else None
    line = {
        "step": step,
        "epoch": step / steps_per_epoch(len(job.train), job.settings.global_batch),
        "loss": float("nan") if loss is None else loss,
        "learning_rate": job.optim.learning_rate * factor_of(job.optim, step - 1, job.steps),
        "grad_norm": window[-1].grad_norm,
        "trained_tokens": trained,
        "tokens_per_second": sum(taken.tokens for taken in window) / max(1e-9, sum(taken.seconds for taken in window)),
        "peak_bytes": peak_bytes(job.processes.device),
    }
    if job.processes.is_main:
        job.log.train(line)
    return loss


def _evaluate(job: Job, position: Position) -> tuple[Position, Evaluation]:
    """Held-out loss at `position`, logged; the position remembers the best one."""
    found = evaluate(job.processes.bare(job.model), job.held_out, job.settings.micro_batch, job.processes)
    line = {"step": position.step, "eval_loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    line["epoch"] = position.step / steps_per_epoch(len(job.train), job.settings.global_batch)
    line["peak_bytes"] = peak_bytes(job.processes.device)
    if job.processes.is_main:
        job.log.evaluation(line)
    if position.best_loss is None or found.loss < position.best_loss:
        position = replace(position, best_loss=found.loss, best_step=position.step, evaluations_since_best=0)
    else:
        position = replace(position, evaluations_since_best=position.evaluations_since_best + 1)
    return position, found


def _save_or_stop(job: Job, position: Position) -> None:
    """A checkpoint when one is due; on a signal one in any case, and then the end."""
    stopping = job.processes.any(job.stop.number is not None)
    settings = job.settings
    due = _due(position.step, settings.save_every) or (settings.save_every and position.step == job.steps)
    best = settings.early_stop and position.best_step == position.step
    if (stopping or due or best) and job.processes.writes:
        taken = replace(position, rates_sha256=rates_sha256(job.optim, position.step, job.steps))
        job.checkpoints.save(taken, job.optimizer, job.trainable)
    job.processes.wait()
    if stopping:
        raise job.stop.error(f"checkpoint-{position.step:06d} holds step {position.step}; the same command resumes it")


def _no_longer_improves(job: Job, position: Position) -> bool:
    patience = job.settings.early_stop
    return patience is not None and position.evaluations_since_best >= patience


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
