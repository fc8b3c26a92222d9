"""What follows an optimizer step: logging, evaluation, checkpoints and early stopping, each when it is due."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qlora.data.batching.sampler import steps_per_epoch
from qlora.memory.meter import peak_bytes
from qlora.training.checkpoint import Position
from qlora.training.eval_loss import Evaluation, evaluate
from qlora.training.job import Job, StepResult
from qlora.training.objectives.comparison_eval import evaluate_answers
from qlora.training.objectives.comparison_step import UNITS, added
from qlora.training.schedule import learning_rate_factor, rates_sha256


def advance(position: Position, result: StepResult) -> Position:
    """The position after one more step."""
    scale = result.next_scale or position.scale
    return replace(
        position,
        step=position.step + 1,
        skipped_steps=position.skipped_steps + (not result.trained_tokens),
        overflow_steps=position.overflow_steps + result.is_overflow,
        loss_scale=scale.value,
        finite_steps=scale.finite_steps,
        open_loss=position.open_loss + result.loss,
        open_trained_tokens=position.open_trained_tokens + result.trained_tokens,
        open_sums=added(position.open_sums, result.weight, result.sums),
    )


def log_steps(job: Job, position: Position, window: Sequence[StepResult]) -> Position:
    """Log the steps since the last line. `window`: those of this process, for the speed; a resumed run has fewer."""
    trained_tokens, sums = position.open_trained_tokens, position.open_sums
    weight = sums[UNITS] if sums else trained_tokens
    loss = position.open_loss / weight if weight else None
    line = {
        "step": position.step,
        "epoch": _epoch(job, position),
        "loss": loss,
        "learning_rate": job.optim.learning_rate * learning_rate_factor(job.optim, position.step - 1, job.total_steps),
        "grad_norm": window[-1].grad_norm,
        "trained_tokens": trained_tokens,
        "tokens_per_second": sum(step.tokens for step in window) / max(1e-9, sum(step.seconds for step in window)),
        "peak_bytes": peak_bytes(job.processes.device),
    }
    if job.comparison is not None:
        line |= job.comparison.metrics(sums)
    if job.scales_loss:
        line |= {"loss_scale": position.loss_scale, "skipped_steps": position.skipped_steps}
    if job.processes.is_main:
        job.log.log_step(line)
    return replace(position, loss=loss, open_loss=0.0, open_trained_tokens=0, open_sums={})


def evaluate_if_due(job: Job, position: Position) -> tuple[Position, bool]:
    """Evaluate if it is due; the second value says whether a stop signal was received, before it or during it.

    An evaluation that a signal prevents or interrupts is left to the resumed run.
    """
    stopping = job.processes.any(job.stop_signal.received)
    is_end = position.step in (0, job.total_steps)
    is_open = job.eval_examples and position.evaluated_step != position.step
    if stopping or not is_open or not (is_end or is_due(position.step, job.settings.eval_every)):
        return position, stopping
    evaluation = _evaluate(job)
    answers = None if evaluation is None else _prompt_answers(job, position)
    if evaluation is None or answers is None:
        return position, True
    return _log_evaluation(job, position, evaluation, answers), job.processes.any(job.stop_signal.received)


def _evaluate(job: Job) -> Evaluation | None:
    """The evaluation of the held-out examples; None if a signal interrupted it."""
    examples, processes = job.eval_examples, job.processes
    options = (min(job.micro_batch_sizes), processes, lambda: job.stop_signal.received, job.log.progress("evaluating"))
    if job.comparison is not None:
        return evaluate_answers(job.comparison, examples, *options)
    return evaluate(processes.unwrap(job.model), examples, *options)


def _prompt_answers(job: Job, position: Position) -> list[dict[str, str]] | None:
    """What the model answers to the sample prompts, the base's answers beside once; None if a signal interrupted it."""
    if job.answer_prompts is None:
        return []
    takes_part = job.processes.is_main or job.processes.shards  # a sharded model takes all ranks
    answers = job.answer_prompts(position.step == 0) if takes_part else []
    return None if job.processes.any(job.stop_signal.received) else answers  # the other ranks wait here


def _log_evaluation(
    job: Job, position: Position, evaluation: Evaluation, answers: Sequence[Mapping[str, str]]
) -> Position:
    """Log an evaluation; returns the position that includes it."""
    loss = evaluation.loss
    line = {"step": position.step, "eval_loss": loss, **evaluation.metrics, "tokens": evaluation.tokens}
    line |= {"epoch": _epoch(job, position), "peak_bytes": peak_bytes(job.processes.device)}
    if job.processes.is_main:
        job.log.log_evaluation(line | ({"answers": answers} if answers else {}))
    warning = job.comparison and job.comparison.warning(line.get("eval_chosen_log_prob"))
    if warning:
        job.log.print(f"step {position.step}: {warning}")
    finite_loss = loss if math.isfinite(loss) else None
    position = replace(position, eval_loss=finite_loss, evaluated_step=position.step)
    accuracy = evaluation.metrics.get("eval_accuracy") if job.settings.early_stop_on == "accuracy" else None
    if finite_loss is not None and _is_better(position, finite_loss, accuracy):
        best = replace(position, best_loss=finite_loss, best_accuracy=accuracy, best_step=position.step)
        return replace(best, evaluations_since_best=0)
    return replace(position, evaluations_since_best=position.evaluations_since_best + 1)


def _is_better(position: Position, loss: float, accuracy: float | None) -> bool:
    """Whether an evaluation is better than the best one so far: by its accuracy, if that is known, else by its loss."""
    if position.best_loss is None or accuracy is None or position.best_accuracy is None:
        return position.best_loss is None or loss < position.best_loss
    return accuracy > position.best_accuracy


def save_if_due(job: Job, position: Position, stopping: bool) -> None:
    """Save every `save_every` steps, at the end, at the best evaluation (with early stopping), and on a signal."""
    settings = job.settings
    due = settings.save_every and (is_due(position.step, settings.save_every) or position.step == job.total_steps)
    best = settings.early_stop and position.best_step == position.step
    if (stopping or due or best) and job.processes.writes:
        digest = rates_sha256(job.optim, position.step, job.total_steps)
        job.checkpoints.save(replace(position, rates_sha256=digest), job.optimizer, job.trainable)
    job.processes.barrier()


def stops_early(job: Job, position: Position) -> bool:
    """Whether `early_stop` evaluations in a row brought no lower loss, or no higher accuracy."""
    patience = job.settings.early_stop
    return patience is not None and position.evaluations_since_best >= patience


def is_due(step: int, every: int | None) -> bool:
    """Whether something done every `every` steps (None: never) is due at `step`."""
    return every is not None and step % every == 0


def _epoch(job: Job, position: Position) -> float:
    return position.step / steps_per_epoch(len(job.train_examples), job.settings.global_batch)
