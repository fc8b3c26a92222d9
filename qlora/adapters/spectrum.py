"""Spectrum of an update: the singular values of s B A, computed from A and B without forming the product.

B = Q_B R_B and A^T = Q_A R_A, so s B A = Q_B (s R_B R_A^T) Q_A^T: one SVD of [R, R] gives all of them. In float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEAD = 0.01  # singular value relative to the largest, up to which a direction holds at most 0.01 % of its energy
ENERGY_SHARE = 0.90  # share of an update's energy by which its rank is judged
LAYER_SHARE = 0.90  # share of the layers in which the suggested rank holds ENERGY_SHARE
MAX_TOO_HIGH, MAX_FITS = 0.5, 0.75  # share of the rank that is used: up to these the rank is too high, or fits
SUGGESTED_RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TOO_HIGH, FITS, SATURATED, UNTRAINED = "too high", "fits", "saturated", "untrained"


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one update, largest first, one for each of its R directions."""

    values: tuple[float, ...]

    @property
    def rank(self) -> int:
        """R: the number of directions."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """|s B A|, Frobenius."""
        return math.sqrt(math.fsum(value**2 for value in self.values))

    @property
    def stable_rank(self) -> float:
        """|s B A|^2 over the largest singular value squared: the effective number of directions. 0 if untrained."""
        return (self.norm / self.values[0]) ** 2 if self.values[0] else 0.0

    @property
    def dead(self) -> int:
        """The number of directions with almost no energy."""
        return sum(value <= DEAD * self.values[0] for value in self.values)

    def energy(self, rank: int) -> float:
        """The share of the squared norm that the first `rank` directions hold; 1 for an untrained update."""
        total = math.fsum(value**2 for value in self.values)
        return math.fsum(value**2 for value in self.values[:rank]) / total if total else 1.0

    def energy_rank(self, share: float) -> int:
        """The fewest directions that hold `share` of the energy; 0 if untrained."""
        ranks = (rank for rank in range(self.rank + 1) if self.energy(rank) >= share - 1e-12)
        return next(ranks) if self.values[0] else 0

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
        """A [rank, I] and B [O, rank] in float32 with B A the best approximation; zeros beyond K directions."""
        root = self.values[:rank].sqrt()
        a, b = root[:, None] * self.v[:, :rank].t(), self.u[:, :rank] * root
        missing = rank - root.numel()
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        return a.float().contiguous(), b.float().contiguous()


@dataclass(frozen=True)
class Advice:
    """The verdict on a rank: too high, fits, saturated (or untrained), and the rank to use."""

    verdict: str
    suggested_rank: int
    reason: str


def factors(a: Tensor, b: Tensor, scaling: float) -> Factors:
    """The SVD of s B A, A [R, I], B [O, R]; costs O(R^2 (I + O)) and no memory beyond both."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, values, vt = torch.linalg.svd(scaling * (r_b @ r_a.t()), full_matrices=False)
    return Factors(q_b @ u, values, q_a @ vt.t())


def spectrum(a: Tensor, b: Tensor, scaling: float) -> Spectrum:
    """The R singular values of s B A, A [R, I], B [O, R]; the last ones are 0 where I or O is smaller than R."""
    r_b, r_a = torch.linalg.qr(b.double(), mode="r").R, torch.linalg.qr(a.double().t(), mode="r").R
    values = torch.linalg.svdvals(scaling * (r_b @ r_a.t())).tolist()
    return Spectrum((*values, *[0.0] * (a.shape[0] - len(values))))


def mean_spectrum(a: Tensor, b: Tensor, scaling: float) -> Spectrum:
    """The root mean square, direction by direction, of the spectra of a stack: A [E, R, I], B [E, O, R].

    Of the products A A^T and B^T B, [R, R] for each of what may be thousands of experts: to 1e-8 of the largest value.
    """
    a, b = a.double(), b.double()
    squares, directions = torch.linalg.eigh(b.transpose(1, 2) @ b)
    root = directions * squares.clamp_min(0).sqrt()[:, None, :]
    energies = torch.linalg.eigvalsh(root.transpose(1, 2) @ (a @ a.transpose(1, 2)) @ root).clamp_min(0).flip(1)
    return Spectrum(tuple((scaling * energies.mean(0).sqrt()).tolist()))


def advise(spectra: Sequence[Spectrum]) -> Advice:
    """Judge the rank of an adapter by the spectra of its trained layers."""
    rank = max(layer.rank for layer in spectra)
    used = sorted(layer.energy_rank(ENERGY_SHARE) for layer in spectra if layer.values[0])
    if not used:
        return Advice(UNTRAINED, rank, "every update is zero")
    needed = used[math.ceil(LAYER_SHARE * len(used)) - 1]
    reason = f"{LAYER_SHARE:.0%} of the layers hold {ENERGY_SHARE:.0%} of their energy in {needed} of {rank} directions"
    if needed > MAX_FITS * rank:
        return Advice(SATURATED, _round_up(2 * rank), reason)
    suggested = min(rank, _round_up(needed))
    if suggested > MAX_TOO_HIGH * rank:
        return Advice(FITS, rank, reason)
    return Advice(TOO_HIGH, suggested, reason)


def _round_up(rank: int) -> int:
    """The next rank that is commonly used and that servers support."""
    return next((suggested for suggested in SUGGESTED_RANKS if suggested >= rank), rank)
