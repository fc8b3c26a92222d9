"""Out of memory: the run steps down once, says why, and repeats the step with the same numbers.

A step's gradients are a pure function of (seed, step), so what was begun is dropped and made again. `rehearse` runs the
longest micro-batch before the first step, so that what fits at step 1 fits at step 10,000.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.sampler import lengths_of
from qlora.data.types import Example
from qlora.errors import QloraError

T = TypeVar("T")
StepDown = Callable[[], str | None]  # takes less memory from now on and says how; None: there is nothing left to give


class OomRecovery:
    """Repeats what ran out of memory after the run has stepped down."""

    def __init__(
        self,
        trainable: Iterable[nn.Parameter] = (),
        step_down: StepDown = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.trainable, self.step_down, self.say = list(trainable), step_down, say

    def run(self, gradients: Callable[[], T]) -> T:
        """What `gradients` gives, begun anew after a step down. QloraError when there is none left."""
        while True:
            try:
                return gradients()
            except torch.OutOfMemoryError as error:
                reason = ". ".join(str(error).split(". ")[:2])  # what happened, and on how many bytes
            # Only here, outside the handler, are the tensors of the step gone with the error's frames.
            self._drop_gradients()
            how = self.step_down()
            if how is None:
                raise QloraError(
                    f"out of memory ({reason}). The same training fits with a smaller train.micro_batch (without "
                    "dropout the result does not change), memory.recompute=all, memory.offload_activations=true, or a "
                    "shorter data.max_length."
                )
            self.say(f"out of memory ({reason}): {how}; the step is repeated with the same numbers")

    def rehearse(self, backward: Callable[[Batch], object], batch: Batch, moment_bytes: int) -> None:
        """One forward and backward that changes nothing, beside as much memory as the optimiser is going to take."""
        ballast = torch.empty(moment_bytes, dtype=torch.uint8, device=batch.input_ids.device)
        with torch.random.fork_rng(devices=[]):
            self.run(lambda: backward(batch))
        del ballast
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies beside the computation may still read what was dropped
            torch.cuda.empty_cache()


def longest(rows: Sequence[Example], micro_batch: int) -> Batch:
    """A micro-batch of the longest rows: none of the run is larger."""
    order = lengths_of(rows).argsort(kind="stable")[::-1]
    return collate([rows[int(row)] for row in order[:micro_batch]], pad_id=0)
