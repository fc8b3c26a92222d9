"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` below 1 is a share of `steps` (rounded up), else a number of steps."""
    return rounded_up(warmup * steps) if warmup < 1 else int(warmup)


def rounded_up(count: float) -> int:
    """The next whole number, the noise of binary fractions left out: 0.07 * 100 is 7."""
    return math.ceil(round(count, 9))


def ramp(step: int, warmup: int) -> float:
    """The factor during warm-up: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(step: int, steps: int, warmup: int) -> float:
    """Factor of optimizer step `step` (from 0) of `steps`: 1 after the warm-up."""
    return ramp(step, warmup)


def linear(step: int, steps: int, warmup: int) -> float:
    """Falls in a line from 1 after the warm-up towards 0 just past the last step."""
    return ramp(step, warmup) if step < warmup else (steps - step) / max(1, steps - warmup)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Falls along half a cosine from 1 after the warm-up towards 0 just past the last step."""
    if step < warmup:
        return ramp(step, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
