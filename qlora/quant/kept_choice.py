"""Which matrices stay in 16 bits: those that save the most loss of information for each byte they add."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixError:
    """What quantizing one matrix alone does, measured on rows of the recipe."""

    name: str
    bytes: int  # that it adds to the packed base if it stays in 16 bits
    error: float  # |X (W - Q)^T| / |X W^T|, Frobenius
    kl: float  # nats per token that quantizing it costs, to second order
    tokens: int  # that reached it


def choose_kept(matrices: Sequence[MatrixError], budget_bytes: int) -> list[str]:
    """Names of the matrices to keep within `budget_bytes`, in the order of `matrices`.

    Errors of different matrices are nearly uncorrelated, so what they cost adds up and the choice is a knapsack:
    greedily by cost per byte, leaving out what no longer fits (Dantzig 1957, Operations Research 5(2)).
    """
    chosen: set[str] = set()
    for matrix in sorted(matrices, key=lambda matrix: -matrix.kl / max(1, matrix.bytes)):
        if matrix.kl > 0 and matrix.bytes <= budget_bytes:
            chosen.add(matrix.name)
            budget_bytes -= matrix.bytes
    return [matrix.name for matrix in matrices if matrix.name in chosen]
