"""Number of steps and learning rate as pure functions of recipe and step: no state to save or restore."""

import hashlib
import math

from qlora.data.batching.sampler import steps_per_epoch
from qlora.training import SCHEDULES, Optim, Train


def count_steps(settings: Train, sequences: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, or those of all epochs (a fraction of an epoch is rounded up)."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, rounded_up(settings.epochs * steps_per_epoch(sequences, settings.global_batch)))


def learning_rate_factor(optim: Optim, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) as a fraction of the peak learning rate."""
    return float(SCHEDULES[optim.schedule](step, total_steps, warmup_steps(optim.warmup, total_steps)))


def rates_sha256(optim: Optim, steps: int, total_steps: int) -> str:
    """A digest of the learning rates of the first `steps` of `total_steps` steps."""
    rates = [optim.learning_rate * learning_rate_factor(optim, step, total_steps) for step in range(steps)]
    return hashlib.sha256(repr(rates).encode()).hexdigest()


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` below 1 is a fraction of `steps` (rounded up), else a number of steps."""
    return rounded_up(warmup * steps) if warmup < 1 else int(warmup)


def rounded_up(count: float) -> int:
    """The next integer, ignoring the rounding error of binary fractions: 0.07 * 100 is 7."""
    return math.ceil(round(count, 9))


def ramp(step: int, warmup: int) -> float:
    """The factor during warm-up: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(step: int, steps: int, warmup: int) -> float:
    """Factor of optimizer step `step` (from 0) of `steps`: 1 after warm-up."""
    return ramp(step, warmup)


def linear(step: int, steps: int, warmup: int) -> float:
    """Decays linearly from 1 after warm-up to 0 at step `steps`, one past the last."""
    return ramp(step, warmup) if step < warmup else (steps - step) / max(1, steps - warmup)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Decays along half a cosine from 1 after warm-up to 0 at step `steps`, one past the last."""
    if step < warmup:
        return ramp(step, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
