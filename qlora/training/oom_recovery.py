"""Out-of-memory recovery: the run reduces its memory use, logs why, and repeats the step with the same numbers.

The gradients of a step are a pure function of (seed, step), so partial gradients are dropped and computed again.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from qlora.errors import QloraError
from qlora.utils.devices import release_cache
from qlora.utils.out_of_memory import is_out_of_memory

T = TypeVar("T")
StepDown = Callable[[], str | None]  # reduces memory use from now on and returns how; None: no reduction is left


class OomRecovery:
    """Repeats a computation that ran out of memory, after memory use was reduced."""

    def __init__(
        self,
        trainable: Iterable[nn.Parameter] = (),
        step_down: StepDown = lambda: None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.trainable, self.step_down, self.log = list(trainable), step_down, log

    def run(self, gradients: Callable[[], T]) -> T:
        """The result of `gradients`, called again after each reduction. QloraError when no reduction is left."""
        while True:
            try:
                return gradients()
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, QloraError) or not is_out_of_memory(error):
                    raise
                reason = ". ".join(str(error).split(". ")[:2])  # what happened, and for how many bytes
            # Outside the handler: the exception's frames keep the tensors of the step alive.
            self.drop_gradients()
            reduction = self.step_down()
            if reduction is None:
                raise QloraError(
                    f"out of memory ({reason}). The same training fits with a smaller train.micro_batch (without "
                    "dropout the result does not change), memory.recompute=all, memory.offload_activations=true, or a "
                    "shorter data.max_length."
                )
            self.log(f"out of memory ({reason}): {reduction}; the step is repeated with the same numbers")

    def drop_gradients(self) -> None:
        """Free all gradients and the allocator's cache."""
        for parameter in self.trainable:
            parameter.grad = None
        for device in {parameter.device for parameter in self.trainable}:
            release_cache(device)  # waits first: a copy stream may still read tensors that were freed
