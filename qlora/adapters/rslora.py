"""rsLoRA (arXiv:2312.03732): LoRA scaled by alpha / sqrt(rank), so that high ranks keep learning."""

import math
from dataclasses import dataclass

from qlora.adapters.lora import Lora


@dataclass(frozen=True)
class RsLora(Lora):
    """Settings of rank-stabilized LoRA."""

    @property
    def scaling(self) -> float:
        """The update's factor s: alpha / sqrt(rank)."""
        return self.alpha / math.sqrt(self.rank)
