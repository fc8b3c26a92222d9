"""Non-finite guard: steps whose loss or gradient is NaN or infinite are skipped; several in a row end the run."""

import math
from collections.abc import Sequence

from qlora.errors import QloraError

MAX_CONSECUTIVE = 3  # non-finite steps in a row that end the run


class NonFiniteGuard:
    """Decides whether an optimizer step may be taken."""

    def __init__(self) -> None:
        self.consecutive = 0  # steps skipped in a row

    def allows(self, grad_norm: float, loss: float, step: int, where: Sequence[str], reason: str) -> bool:
        """False if the gradient norm or the loss is not finite. QloraError, naming examples, for the last one in a row.

        where: file:line of the step's examples. reason: what is not finite.
        """
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self.consecutive = 0
            return True
        self.consecutive += 1
        if self.consecutive >= MAX_CONSECUTIVE:
            raise QloraError(
                f"step {step}: {reason} for {MAX_CONSECUTIVE} steps in a row "
                f"(examples {', '.join(where[:3])}). None of these steps changed the adapter. "
                "Lower optim.learning_rate, or inspect these examples with `qlora preview`."
            )
        return False
