"""rsLoRA (arXiv:2312.03732): LoRA scaled by alpha / sqrt(rank), so that high ranks keep learning."""

import math
from dataclasses import dataclass, replace

from qlora.adapters.lora import Lora


@dataclass(frozen=True)
class RsLora(Lora):
    """Settings of rank-stabilised LoRA."""

    @property
    def scaling(self) -> float:
        """Strength of the update: alpha / sqrt(rank)."""
        return self.alpha / math.sqrt(self.rank)

    def of_rank(self, rank: int) -> Lora:
        """The same kind and strength at another rank."""
        return replace(self, rank=rank, alpha=self.alpha * math.sqrt(rank / self.rank))
