"""Blockwise quantization in plain torch: the readable reference that the fast operators are tested against bit for bit.

    W [O, I] is read row by row in blocks of K weights. A block is scaled by its largest magnitude (absmax), each weight
    becomes the code of the nearest of 16 levels; two codes fill a byte, the first in the high nibble.
    Double quantization does the same to the N values of absmax: minus their mean, in blocks of 256, to 8 bits.

QLoRA sections 2 and 3, arXiv:2305.14314; 8-bit dynamic type: arXiv:1511.04561. Training uses bitsandbytes_ops.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.quant.block_sizes import NESTED_BLOCK

TINY = 1e-38  # lower bound of a divisor, for blocks of zeros
GRID = 2**16 - 1  # steps from -1 to 1 on which bitsandbytes' CPU kernel looks up 8-bit codes


def quantize(weight: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """One scale for each block of `block` weights, and for each weight the code of its nearest level.

    weight [O, I] float; levels [16] in [-1, 1], by code -> codes uint8 [ceil(O*I/2)]; absmax float32 [N].
    Error per weight <= absmax * half the widest gap of `levels` (NF4: 0.152 absmax, FP4: 0.167 absmax).
    """
    flat = weight.float().reshape(-1)
    absmax = block_absmax(flat, block)
    full = flat.numel() // block  # full blocks; a shorter last one is divided, not multiplied by the reciprocal
    scaled = flat[: full * block].reshape(full, block) * (1 / absmax[:full].clamp(min=TINY)).reshape(-1, 1)
    if flat.numel() > full * block:
        absmax = torch.cat([absmax[:full], absmax[full:].clamp(min=TINY)])
        scaled = torch.cat([scaled.reshape(-1), flat[full * block :] / absmax[full]])
    return pack(scaled.reshape(-1).clamp(-1, 1), levels), absmax


def dequantize(codes: Tensor, absmax: Tensor, levels: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """W [O, I] float32 from codes uint8 [ceil(O*I/2)] and absmax float32 [N]. Other types: round the result once."""
    weights = shape[0] * shape[1]
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)[:weights]
    return (levels[nibbles.long()] * absmax.repeat_interleave(block)[:weights]).reshape(shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: absmax float32 [N] -> codes uint8 [N], nested absmax float32 [ceil(N/256)], offset [1].

    As bitsandbytes on a CPU: each scaled value is first rounded to a grid of 65,536 points. A GPU has no such grid, so
    that the two may choose neighboring codes near a midpoint and near zero.
    """
    offset = absmax.mean()
    centered = absmax - offset
    nested_absmax = block_absmax(centered, NESTED_BLOCK)
    scaled = centered * (1 / nested_absmax).repeat_interleave(NESTED_BLOCK)[: centered.numel()]
    point = ((scaled.clamp(-1, 1) + 1) * 0.5 * GRID + 0.5).floor()
    codes = nearest(point * (2 / GRID) - 1, dynamic_levels())
    all_zero = (nested_absmax == 0).repeat_interleave(NESTED_BLOCK)[: centered.numel()]
    return codes.masked_fill(all_zero, 0), nested_absmax, offset.reshape(1)


def restore_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Undo quantize_absmax, float32 [N]; error per value <= 0.00704 of its nested absmax."""
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return dynamic_levels()[codes.long()] * scales + offset


def dynamic_levels() -> Tensor:
    """The 256 levels of the dynamic 8-bit type, float32, rising: 7 decades, each twice as fine as the last; 0; 1."""
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        midpoints = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [midpoints, -midpoints]
    return torch.cat(levels).sort().values


def block_absmax(flat: Tensor, block: int) -> Tensor:
    """The largest magnitude of each block of values, [N]; the last block may be shorter."""
    blocks = F.pad(flat, (0, -flat.numel() % block)).reshape(-1, block)  # [N, K]
    return blocks.abs().amax(dim=1)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The code, uint8, of the level nearest to each value; a midpoint goes to the lower level."""
    order = levels.argsort(stable=True)
    rising = levels[order]
    return order[torch.bucketize(values, (rising[:-1] + rising[1:]) / 2)].to(torch.uint8)


def pack(scaled: Tensor, levels: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble, uint8 [ceil(n/2)]; an odd last one is paired with zero."""
    codes = nearest(F.pad(scaled, (0, scaled.numel() % 2)), levels)
    return (codes[::2] << 4) | codes[1::2]
