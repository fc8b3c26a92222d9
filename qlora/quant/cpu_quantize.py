"""Quantising on a CPU: blockwise.py's bits from a table over a grid, eight times as fast as bitsandbytes' search.

[-1, 1] is cut into cells so fine that no two midpoints between levels share one. A weight's cell says which code it
has below and above that midpoint, and one comparison decides; exact, since the cell never falls as a weight rises.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.quant import blockwise
from qlora.quant.levels import LEVELS

CELLS = 2048  # to each side of zero
CHUNK = 2**16  # weights at a time: a multiple of every block, and small enough for a core's cache


class Table(NamedTuple):
    """For each cell the midpoint in it (infinite if there is none), and the codes below and above it."""

    midpoint: Tensor  # float32 [cells]
    below: Tensor  # uint8 [cells]
    above: Tensor  # uint8 [cells]


def quantize(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(O*I/2)] and absmax float32 [N] of a finite weight on the CPU, as blockwise.quantize gives them.

    16 bytes of scratch for each of CHUNK weights.
    """
    flat = weight.reshape(-1)
    whole = flat.numel() // block * block  # a shorter block at the end is scaled otherwise
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block))
    for start in range(0, whole, CHUNK):
        runs = flat[start : min(start + CHUNK, whole)].float().reshape(-1, block)
        largest = runs.abs().amax(dim=1)
        scaled = (runs * (1 / largest.clamp(min=blockwise.TINY)).reshape(-1, 1)).reshape(-1).clamp_(-1, 1)
        nibbles = _nearest(scaled, table(kind))
        codes[start // 2 : (start + len(scaled)) // 2] = (nibbles[::2] << 4) | nibbles[1::2]
        absmax[start // block : (start + len(scaled)) // block] = largest
    if whole < flat.numel():
        rest = blockwise.quantize(flat[whole:].reshape(1, -1), LEVELS[kind](), block)
        codes[whole // 2 :], absmax[whole // block :] = rest
    return codes, absmax


@lru_cache
def table(kind: str) -> Table:
    """The cells of a kind's levels."""
    levels = LEVELS[kind]()
    order = levels.argsort(stable=True)
    middles = (levels[order][:-1] + levels[order][1:]) / 2
    cells = _cell(middles)
    if len(cells.unique()) < len(cells):
        raise AssertionError(f"{kind}: two midpoints share a cell; CELLS is too small")
    every = torch.arange(2 * CELLS + 1)
    midpoint = torch.full((len(every),), torch.inf)
    midpoint[cells.long()] = middles
    passed = torch.bucketize(every, cells)  # midpoints in the cells before
    codes = order.to(torch.uint8)
    return Table(midpoint, codes[passed], codes[(passed + 1).clamp(max=len(order) - 1)])


def _nearest(scaled: Tensor, cells: Table) -> Tensor:
    """The code of the level nearest to each value in [-1, 1]; half-way goes to the lower level."""
    cell = _cell(scaled)
    above = scaled > cells.midpoint.index_select(0, cell)
    return torch.where(above, cells.above.index_select(0, cell), cells.below.index_select(0, cell))


def _cell(values: Tensor) -> Tensor:
    return ((values + 1) * CELLS).to(torch.int32)
