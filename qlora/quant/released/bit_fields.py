"""Codes of a few bits, unpacked: little-endian bit fields of int32 words, and pairs of 4-bit floats (e2m1) in bytes."""

from functools import cache

import torch
from torch import Tensor

# By code: 1 bit of sign, 2 of exponent, 1 of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
WORD = 32  # bits


def words_for(count: int, bits: int) -> int:
    """Int32 words that hold `count` fields of `bits` bits."""
    return -(-count * bits // WORD)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` fields of `bits` <= 8 bits of each row: int32 [N, W] -> int32 [N, count], values >= 0.

    Field i starts at bit i * bits, lowest bit first, and may continue in the next word.
    """
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        fields: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return fields.reshape(len(words), -1)[:, :count]
    starts = torch.arange(count) * bits
    word, offset = starts // WORD, (starts % WORD).int()
    low = (words[:, word] >> offset) & ((1 << (WORD - offset).clamp(max=bits)) - 1).int()
    after = (word + 1).clamp(max=words.shape[1] - 1)
    kept = (WORD - offset).clamp(max=bits)  # bits of the field in its first word
    high = (words[:, after] & ((1 << (bits - kept)) - 1).int()) << kept
    return torch.bitwise_or(low, high.int())


def floats8(codes: Tensor) -> Tensor:
    """8-bit floats in float32. Looked up: torch converts them seven times as slowly."""
    values = _floats8(codes.dtype).index_select(0, codes.contiguous().view(torch.uint8).reshape(-1).int())
    return values.reshape(codes.shape)


def e2m1(packed: Tensor) -> Tensor:
    """Pairs of e2m1 floats in bytes, uint8 [N, B] -> float32 [N, 2B]."""
    pairs = _e2m1_pairs().index_select(0, packed.reshape(-1).int())
    return pairs.view(torch.float32).reshape(len(packed), -1)


@cache
def _floats8(dtype: torch.dtype) -> Tensor:
    return torch.arange(256).to(torch.uint8).view(dtype).float()


@cache
def _e2m1_pairs() -> Tensor:
    """The two float32 values of each byte, as an int64 [256]: the low nibble comes first."""
    values, byte = torch.tensor(E2M1), torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.int64).reshape(256)


def power_of_two(exponents: Tensor) -> Tensor:
    """2^(e - 127) in float32 of exponents e in 8 bits (e8m0, stored as such or as uint8); NaN for e = 255."""
    return exponents.contiguous().view(torch.uint8).view(torch.float8_e8m0fnu).float()
