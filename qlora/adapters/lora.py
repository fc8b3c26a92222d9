"""LoRA (arXiv:2106.09685): a low-rank update beside each frozen matrix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qlora.adapters.lora_autograd import Accumulate, Branch, LoraScale
from qlora.adapters.patterns import by_pattern
from qlora.quant.linear import FrozenLinear
from qlora.utils.rematerialize import origin_of


class LoraLinear(nn.Module):
    """y = base(x) + s (x A^T) B^T, s = alpha / rank; A [R, I], B [O, R]. B = 0: training starts at the base's output.

    A and B are float32 whatever the base computes in. `active = False` leaves the base alone.

    A start elsewhere than at B = 0 may keep A0 [R, I] and B0 [O, R], which never train: the update is then
    s (B A - B0 A0), which any reader knows as a LoRA of rank 2 R beside the same base.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, base: FrozenLinear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        device = base.device
        self.base, self.rank, self.scaling, self.dropout = base, rank, scaling, dropout
        self.active = True
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        for name in ("A0", "B0"):
            self.register_buffer(name, None, persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(I), as PEFT starts it; B zero. `generator` lives on the CPU, so cards start alike."""
        bound = 1 / math.sqrt(self.base.in_features)
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O], both in the base's compute dtype."""
        if not self.active:
            return self.base(x)  # type: ignore[no-any-return]
        strength = LoraScale(self.scaling, self.dropout if self.training else 0.0)
        update, passed_on = Branch.apply(x, *self.pair(), strength, origin_of(x))
        return Accumulate.apply(update, passed_on if x.requires_grad else x, self.base)  # type: ignore[no-any-return]

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as they act: [A; A0] and [B, -B0] where A0 and B0 are kept."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    @torch.no_grad()
    def fill(self, a: Tensor, b: Tensor) -> None:
        """Overwrite, in place, what `pair` gives."""
        self.A.copy_(a[: self.rank])
        self.B.copy_(b[:, : self.rank])
        if self.A0 is not None and self.B0 is not None:
            self.A0.copy_(a[self.rank :])
            self.B0.copy_(-b[:, self.rank :])

    def delta(self) -> Tensor:
        """S B A [O, I] in float32: what the adapter adds to the frozen matrix."""
        a, b = self.pair()
        return self.scaling * (b.detach() @ a.detach())

    def merged_weight(self) -> Tensor:
        """The frozen matrix as it is stored, plus the update, [O, I] in float32."""
        return self.base.weight(torch.float32) + self.delta()


@dataclass(frozen=True)
class Lora:
    """Settings of plain LoRA; builds one LoraLinear per frozen matrix.

    The patterns give some modules a rank or an alpha of their own: `at(path)` is what counts for one.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Strength of the update: alpha / rank."""
        return self.alpha / self.rank

    def at(self, path: str) -> "Lora":
        """The settings of one module, the patterns followed."""
        rank, alpha = by_pattern(self.rank_pattern, path, self.rank), by_pattern(self.alpha_pattern, path, self.alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def widened(self, times: int) -> "Lora":
        """The same strengths at so many times the ranks."""
        stronger = replace(self, rank=self.rank * times).scaling / self.scaling
        return replace(
            self,
            rank=self.rank * times,
            alpha=self.alpha / stronger,
            rank_pattern={key: rank * times for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: alpha / stronger for key, alpha in self.alpha_pattern.items()},
        )

    def wrap(self, base: FrozenLinear) -> LoraLinear:
        """`base` with an untrained update beside it."""
        return LoraLinear(base, self.rank, self.scaling, self.dropout)
