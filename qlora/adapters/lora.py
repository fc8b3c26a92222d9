"""LoRA (arXiv:2106.09685): a low-rank update added to each frozen matrix."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.lora_autograd import AddFrozenMatmul, LoraBranch, LoraScale
from qlora.adapters.lora_group import together
from qlora.adapters.patterns import by_pattern
from qlora.quant.expert_stack import ExpertStack
from qlora.quant.linear import FrozenLinear
from qlora.utils.rematerialize import origin_of


class LoraLinear(nn.Module):
    """y = base(x) + s (x A^T) B^T, s = alpha / rank; A [R, I], B [O, R]. B = 0: training starts at the base's output.

    A and B are float32 whatever dtype the base computes in. `active = False` switches the update off.

    An initialization with B != 0 may keep A0 [R, I] and B0 [O, R], which never train: the update is then
    s (B A - B0 A0), which any reader can load as a LoRA of rank 2 R on the same base.
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
        """A uniform in +-1/sqrt(I), as in PEFT; B zero. `generator` is on the CPU, so all devices start alike."""
        bound = 1 / math.sqrt(self.base.in_features)
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O], both in the base's compute dtype."""
        if not self.active:
            return self.base(x)  # type: ignore[no-any-return]
        scale = LoraScale(self.scaling, self.dropout if self.training else 0.0, id(self))
        update, x_out = LoraBranch.apply(x, *self.pair(), scale, origin_of(x))
        return AddFrozenMatmul.apply(update, x_out if x.requires_grad else x, self.base)  # type: ignore[no-any-return]

    def forward_together(self, x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor] | None:
        """layer(x) of all `layers` by one function; None if they can't join a group."""
        return together(x, layers) if all(type(layer) is LoraLinear for layer in layers) else None

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update: [A; A0] and [B, -B0] where A0 and B0 are kept."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    @torch.no_grad()
    def load_pair(self, a: Tensor, b: Tensor) -> None:
        """Overwrite A and B, and A0 and B0 where they are kept, in place, by what `pair` returned."""
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
        """The dequantized frozen matrix plus the update, [O, I] in float32."""
        return self.base.weight(torch.float32) + self.delta()


@dataclass(frozen=True)
class Lora:
    """Settings of plain LoRA; builds one LoraLinear per frozen matrix.

    The patterns give some modules another rank or alpha: `for_module(path)` returns the settings of one. expert_rank:
    of the update of each expert; 0: experts stay frozen.
    """

    rank: int
    alpha: float
    dropout: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    expert_rank: int = 0

    @property
    def scaling(self) -> float:
        """The update's factor s: alpha / rank."""
        return self.alpha / self.rank

    def for_module(self, path: str) -> "Lora":
        """The settings of one module, with the patterns applied."""
        rank, alpha = by_pattern(self.rank_pattern, path, self.rank), by_pattern(self.alpha_pattern, path, self.alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def for_experts(self, path: str) -> "Lora":
        """The settings of one stack of experts: `expert_rank` at the adapter's scaling.

        A pattern gives another rank or alpha; as in every module, a rank of a pattern does not change alpha.
        """
        rank = by_pattern(self.rank_pattern, path, self.expert_rank)
        is_given = by_pattern(self.rank_pattern, path, 0) > 0
        alpha = self.alpha if is_given else self.alpha * self.scaling / replace(self, rank=rank).scaling
        alpha = by_pattern(self.alpha_pattern, path, alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def with_rank_times(self, factor: int) -> "Lora":
        """The same scaling at `factor` times the rank."""
        change = replace(self, rank=self.rank * factor).scaling / self.scaling
        return replace(
            self,
            rank=self.rank * factor,
            alpha=self.alpha / change,
            rank_pattern={key: rank * factor for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: alpha / change for key, alpha in self.alpha_pattern.items()},
            expert_rank=self.expert_rank * factor,
        )

    def wrap(self, base: FrozenLinear) -> LoraLinear:
        """`base` with an untrained update."""
        return LoraLinear(base, self.rank, self.scaling, self.dropout)

    def wrap_experts(self, base: ExpertStack) -> ExpertLora:
        """`base` with an untrained update of each expert."""
        return ExpertLora(base, self.rank, self.scaling, self.dropout)
