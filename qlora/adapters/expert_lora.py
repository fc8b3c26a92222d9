"""LoRA on the experts of a layer: an update for the matrix of each expert, all of them in one A and one B.

    y = base(x, e) + s (x A_e^T) B_e^T,   A [E, R, I], B [E, O, R], s = alpha / rank

A forward of the layer calls it once for every expert that tokens visit. The sides of one expert are views of A and B:
all views of a parameter come from one `unbind`, whose backward writes one gradient as large as the parameter. Indexing
A for each expert would add one such gradient for every expert.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.lora_autograd import AddFrozenMatmul, LoraBranch, LoraScale
from qlora.quant.expert_stack import ExpertStack
from qlora.quant.linear import FrozenLinear
from qlora.utils.rematerialize import origin_of

Sides = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Views:
    """The sides of every expert, with what they are views of: a change in place makes another version."""

    parameters: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    a: Sides
    b: Sides

    def are_of(self, a: Tensor, b: Tensor) -> bool:
        same = self.parameters[0] is a and self.parameters[1] is b
        return same and self.versions == (a._version, b._version)


class ExpertLora(nn.Module):
    """A stack of E frozen matrices and their updates; A [E, R, I] and B [E, O, R] are float32, B = 0 at the start.

    As in `LoraLinear`, `active = False` switches the updates off, and A0 [E, R, I] and B0 [E, O, R] never train.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, base: ExpertStack, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        first = base[0]
        assert isinstance(first, FrozenLinear)
        self.base, self.rank, self.scaling, self.dropout = base, rank, scaling, dropout
        self.active = True
        self.A = nn.Parameter(torch.empty(len(base), rank, first.in_features, device=first.device))
        self.B = nn.Parameter(torch.zeros(len(base), first.out_features, rank, device=first.device))
        for name in ("A0", "B0"):
            self.register_buffer(name, None, persistent=False)
        self._views: _Views | None = None

    def __len__(self) -> int:
        """The number of experts, as of a stack."""
        return len(self.base)

    def reset(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(I), as in PEFT; B zero. `generator` is on the CPU, so all devices start alike."""
        bound = 1 / math.sqrt(self.A.shape[-1])
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """X [N, I] -> [N, O] by one expert, both in the base's compute dtype."""
        if not self.active:
            return self.base(x, expert)  # type: ignore[no-any-return]
        scale = LoraScale(self.scaling, self.dropout if self.training else 0.0, (id(self), expert))
        update, x_out = LoraBranch.apply(x, *self._sides(expert), scale, origin_of(x))
        return AddFrozenMatmul.apply(update, x_out if x.requires_grad else x, self.base[expert])  # type: ignore[no-any-return]

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole updates: [A; A0] and [B, -B0] of each expert where A0 and B0 are kept."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0], dim=1), torch.cat([self.B, -self.B0], dim=2)

    @torch.no_grad()
    def load_pair(self, a: Tensor, b: Tensor) -> None:
        """Overwrite A and B, and A0 and B0 where they are kept, in place, by what `pair` returned."""
        self.A.copy_(a[:, : self.rank])
        self.B.copy_(b[..., : self.rank])
        if self.A0 is not None and self.B0 is not None:
            self.A0.copy_(a[:, self.rank :])
            self.B0.copy_(-b[..., self.rank :])

    def delta(self, expert: int) -> Tensor:
        """S B A [O, I] of one expert in float32: what the adapter adds to its frozen matrix."""
        a, b = self.pair()
        return self.scaling * (b[expert].detach() @ a[expert].detach())

    def _sides(self, expert: int) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of one expert."""
        a, b = self._trained_sides(expert)
        if self.A0 is None or self.B0 is None:
            return a, b
        return torch.cat([a, self.A0[expert]]), torch.cat([b, -self.B0[expert]], dim=1)

    def _trained_sides(self, expert: int) -> tuple[Tensor, Tensor]:
        if not (torch.is_grad_enabled() and self.A.requires_grad) or torch.compiler.is_compiling():
            return self.A[expert], self.B[expert]
        # Kept until A and B change: an unbind saves no tensors, so that its node can be part of several graphs.
        if self._views is None or not self._views.are_of(self.A, self.B):
            versions = self.A._version, self.B._version
            self._views = _Views((self.A, self.B), versions, self.A.unbind(), self.B.unbind())
        return self._views.a[expert], self._views.b[expert]

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpertLora":
        """What nn.Module.to, .cuda ... run on every tensor: the views are of the memory before."""
        self._views = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The module without its views, which can't be copied."""
        return {**self.__dict__, "_views": None}

    def extra_repr(self) -> str:
        """The number of experts and the rank, as print(model) shows it."""
        return f"experts={len(self.base)}, rank={self.rank}"
