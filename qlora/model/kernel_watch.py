"""Watch on an attention kernel during one forward: whether the model's class asks only for what the kernel computes.

A class may ignore the keyword arguments that carry document starts, build a mask of its own kind, or pass a soft cap:
the kernel would then compute something else without an error.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Keyword arguments of attention functions in transformers that change the result.
CHANGING = ("softcap", "sinks", "position_bias", "head_mask", "alibi")


@dataclass
class KernelUse:
    """What a model asked of the kernel in one forward."""

    calls: int = 0
    windows: set[int | None] = field(default_factory=set)  # sliding windows of the calls
    masks: set[int | None] = field(default_factory=set)  # windows or chunks of the masks
    problems: list[str] = field(default_factory=list)

    def problem(self) -> str | None:
        """Why the kernel does not compute what the class means; None if it does."""
        if not self.calls:
            return "no attention layer calls it"
        unknown = {window for window in self.masks - self.windows if window}  # a mask of 0 tokens is never used
        if unknown:
            return f"its layers do not pass their window of {max(size or 0 for size in unknown):,} tokens"
        return next(iter(self.problems), None)


class Watch:
    """The use that is recorded now; None outside of `watch_kernel`."""

    current: KernelUse | None = None


@contextmanager
def watch_kernel() -> Iterator[KernelUse]:
    """Record the use of the kernel inside the block."""
    Watch.current = use = KernelUse()
    try:
        yield use
    finally:
        Watch.current = None


def record_call(options: Mapping[str, Any]) -> None:
    """Record one call with its keyword arguments."""
    use = Watch.current
    if use is None:
        return
    use.calls += 1
    use.windows.add(options.get("sliding_window"))
    if options.get("documents") is None:
        use.problems.append("its layers do not pass document starts on")
    if options.get("is_causal") is False:
        use.problems.append("its attention is not causal")
    use.problems += [f"its layers pass {name}" for name in CHANGING if options.get(name) is not None]


def record_mask(mask: Tensor | None, options: Mapping[str, Any]) -> None:
    """Record the mask [B, 1, T, T] that transformers would build; it must be causal but for its window or chunk."""
    use = Watch.current
    if use is None:
        return
    use.masks.add(options.get("local_size"))
    length = int(options["q_length"])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if mask is None or bool((mask.cpu() & ~causal).any()):
        use.problems.append("its attention is not causal")
    elif options.get("local_size") is None and bool((~mask.cpu() & causal).any()):
        use.problems.append("its mask hides earlier tokens")
