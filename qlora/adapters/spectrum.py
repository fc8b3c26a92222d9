"""What an update uses of its rank: the singular values of s B A, from A and B alone, never the matrix they make.

B = Q_B R_B and A^T = Q_A R_A, so s B A = Q_B (s R_B R_A^T) Q_A^T: one SVD of [R, R] gives all of it. In float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEAD = 0.01  # a direction shorter than this share of the longest holds less than 0.01 % of its energy
ENERGY = 0.90  # share of an update's energy by which its rank is judged
LAYERS = 0.90  # share of the layers that the suggested rank holds so much of
ROOMY, FULL = 0.5, 0.75  # share of the rank that is used: up to here too much room, above there too little
RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # what is suggested
TOO_HIGH, FITS, SATURATED, UNTRAINED = "too high", "fits", "saturated", "untrained"


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one update, largest first, one for each of its R directions."""

    values: tuple[float, ...]

    @property
    def rank(self) -> int:
        """R: how many directions there is room for."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """|s B A|, Frobenius."""
        return math.sqrt(math.fsum(value**2 for value in self.values))

    @property
    def stable_rank(self) -> float:
        """|s B A|^2 over the largest singular value squared: how many directions are long. 0 if untrained."""
        return (self.norm / self.values[0]) ** 2 if self.values[0] else 0.0

    @property
    def dead(self) -> int:
        """Directions that hold next to nothing."""
        return sum(value <= DEAD * self.values[0] for value in self.values)

    def energy(self, rank: int) -> float:
        """The share of the squared norm that the first `rank` directions hold; 1 for an untrained update."""
        whole = math.fsum(value**2 for value in self.values)
        return math.fsum(value**2 for value in self.values[:rank]) / whole if whole else 1.0

    def energy_rank(self, share: float) -> int:
        """The fewest directions that hold `share` of the energy; 0 if untrained."""
        held = (rank for rank in range(self.rank + 1) if self.energy(rank) >= share - 1e-12)
        return next(held) if self.values[0] else 0

    def error(self, rank: int) -> float:
        """|D - D_rank| / |D| for the best approximation of that rank."""
        return math.sqrt(max(0.0, 1.0 - self.energy(rank)))


@dataclass(frozen=True)
class Factors:
    """U diag(values) V^T = s B A, with orthonormal columns: U [O, K], values [K], V [I, K], K at most R."""

    u: Tensor
    values: Tensor
    v: Tensor

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, I] and B [O, rank] in float32 with B A the best approximation; zeros where there is no direction."""
        root = self.values[:rank].sqrt()
        a, b = root[:, None] * self.v[:, :rank].t(), self.u[:, :rank] * root
        missing = rank - root.numel()
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        return a.float().contiguous(), b.float().contiguous()


@dataclass(frozen=True)
class Advice:
    """Whether the rank was right: too high, fits, saturated (or untrained), and which rank to take."""

    verdict: str
    suggested_rank: int
    reason: str


def factors(a: Tensor, b: Tensor, scaling: float) -> Factors:
    """Take s B A apart, A [R, I], B [O, R]; costs O(R^2 (I + O)) and no memory beyond both."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, values, vt = torch.linalg.svd(scaling * (r_b @ r_a.t()), full_matrices=False)
    return Factors(q_b @ u, values, q_a @ vt.t())


def spectrum(a: Tensor, b: Tensor, scaling: float) -> Spectrum:
    """The singular values of s B A, A [R, I], B [O, R]; R of them, the last ones 0 where a side is smaller than R."""
    r_b, r_a = torch.linalg.qr(b.double(), mode="r").R, torch.linalg.qr(a.double().t(), mode="r").R
    values = torch.linalg.svdvals(scaling * (r_b @ r_a.t())).tolist()
    return Spectrum((*values, *[0.0] * (a.shape[0] - len(values))))


def advise(spectra: Sequence[Spectrum]) -> Advice:
    """Judge the rank of an adapter by all its layers that were trained."""
    rank = max(each.rank for each in spectra)
    used = sorted(each.energy_rank(ENERGY) for each in spectra if each.values[0])
    if not used:
        return Advice(UNTRAINED, rank, "every update is zero")
    needed = used[math.ceil(LAYERS * len(used)) - 1]
    reason = f"{LAYERS:.0%} of the layers hold {ENERGY:.0%} of their energy in {needed} of {rank} directions"
    if needed > FULL * rank:
        return Advice(SATURATED, _round_up(2 * rank), reason)
    suggested = min(rank, _round_up(needed))
    if suggested > ROOMY * rank:
        return Advice(FITS, rank, reason)
    return Advice(TOO_HIGH, suggested, reason)


def _round_up(rank: int) -> int:
    """The next rank that people and servers use."""
    return next((each for each in RANKS if each >= rank), rank)
