"""Quantization on a CPU by table lookup: the bits of blockwise.py, eight times as fast as bitsandbytes' search.

[-1, 1] is divided into cells so small that no two midpoints between levels share one. A weight's cell gives the codes
below and above its midpoint, and one comparison decides. This is exact, since the cell index never falls as a weight
rises.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.quant import blockwise
from qlora.quant.levels import LEVELS

CELLS = 2048  # on each side of zero
CHUNK = 2**16  # weights at a time: a multiple of every block size, small enough for a core's cache


class Table(NamedTuple):
    """By cell: the midpoint inside it (infinite if there is none), and the codes below and above that midpoint."""

    midpoint: Tensor  # float32 [cells]
    below: Tensor  # uint8 [cells]
    above: Tensor  # uint8 [cells]


def quantize(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(O*I/2)] and absmax float32 [N] of a finite weight on the CPU, equal to blockwise.quantize.

    Takes 16 bytes of scratch memory for each of CHUNK weights.
    """
    flat = weight.reshape(-1)
    full = flat.numel() // block * block  # weights in full blocks; a shorter last block is scaled differently
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block))
    for start in range(0, full, CHUNK):
        blocks = flat[start : min(start + CHUNK, full)].float().reshape(-1, block)
        largest = blocks.abs().amax(dim=1)
        scaled = (blocks * (1 / largest.clamp(min=blockwise.TINY)).reshape(-1, 1)).reshape(-1).clamp_(-1, 1)
        nibbles = _nearest(scaled, table(kind))
        codes[start // 2 : (start + len(scaled)) // 2] = (nibbles[::2] << 4) | nibbles[1::2]
        absmax[start // block : (start + len(scaled)) // block] = largest
    if full < flat.numel():
        rest = blockwise.quantize(flat[full:].reshape(1, -1), LEVELS[kind](), block)
        codes[full // 2 :], absmax[full // block :] = rest
    return codes, absmax


@lru_cache
def table(kind: str) -> Table:
    """The lookup table of a kind's levels."""
    levels = LEVELS[kind]()
    order = levels.argsort(stable=True)
    midpoints = (levels[order][:-1] + levels[order][1:]) / 2
    cells = _cell(midpoints)
    if len(cells.unique()) < len(cells):
        raise AssertionError(f"{kind}: two midpoints share a cell; CELLS is too small")
    all_cells = torch.arange(2 * CELLS + 1)
    midpoint = torch.full((len(all_cells),), torch.inf)
    midpoint[cells.long()] = midpoints
    below = torch.bucketize(all_cells, cells)  # midpoints in earlier cells
    codes = order.to(torch.uint8)
    return Table(midpoint, codes[below], codes[(below + 1).clamp(max=len(order) - 1)])


def _nearest(scaled: Tensor, lookup: Table) -> Tensor:
    """The code of the level nearest to each value in [-1, 1]; a midpoint goes to the lower level."""
    cell = _cell(scaled)
    above = scaled > lookup.midpoint.index_select(0, cell)
    return torch.where(above, lookup.above.index_select(0, cell), lookup.below.index_select(0, cell))


def _cell(values: Tensor) -> Tensor:
    return ((values + 1) * CELLS).to(torch.int32)
