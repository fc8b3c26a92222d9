"""Rotary position embedding of query and key in Triton: one kernel for both, forward or backward.

For the layout whose pairs are i and i + D/2. Each product and sum is rounded as torch rounds it. `rotary_pair.py` holds
the reference.
"""

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # heads of a token that one program rotates


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    x, out, x_stride, out_stride, head, heads, cos, sin, half, INVERSE: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads of one token, from `head` on."""
    kind = out.dtype.element_ty
    column = tl.arange(0, HALF)
    rows = head + tl.arange(0, HEADS)
    inside = (rows[:, None] < heads) & (column[None, :] < half)
    cos_first = tl.load(cos + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    position = rows[:, None] * x_stride + column[None, :]
    first = tl.load(x + position, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + half + position, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:  # the transposed rotation
        turned_first, turned_second = second * sin_second, -(first * sin_first)
    else:
        turned_first, turned_second = -(second * sin_first), first * sin_second
    new_first = (first * cos_first).to(kind).to(tl.float32) + turned_first.to(kind).to(tl.float32)
    new_second = (second * cos_second).to(kind).to(tl.float32) + turned_second.to(kind).to(tl.float32)
    target = rows[:, None] * out_stride + column[None, :]
    tl.store(out + target, new_first.to(kind), mask=inside)
    tl.store(out + half + target, new_second.to(kind), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_pair(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel takes each pointer as a parameter
    query, key, query_out, key_out, cos, sin, tokens, half, query_heads, key_heads,
    query_row, query_token, query_head, key_row, key_token, key_head,
    query_out_row, query_out_token, query_out_head, key_out_row, key_out_token, key_out_head, cos_row, cos_token,
    INVERSE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token of one sequence; the programs of axis 1 take the query's heads first, then the key's."""
    index = tl.program_id(0)
    row, token = (index // tokens).to(tl.int64), (index % tokens).to(tl.int64)
    cos += row * cos_row + token * cos_token
    sin += row * cos_row + token * cos_token
    part = tl.program_id(1)
    query_parts = tl.cdiv(query_heads, HEADS)
    if part < query_parts:
        _rotate(
            query + row * query_row + token * query_token,
            query_out + row * query_out_row + token * query_out_token,
            query_head, query_out_head, part * HEADS, query_heads, cos, sin, half, INVERSE, HALF, HEADS,
        )  # fmt: skip
    else:
        _rotate(
            key + row * key_row + token * key_token,
            key_out + row * key_out_row + token * key_out_token,
            key_head, key_out_head, (part - query_parts) * HEADS, key_heads, cos, sin, half, INVERSE, HALF, HEADS,
        )  # fmt: skip


def rotate(pair: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, inverse: bool, outs: tuple[Tensor, Tensor]) -> None:
    """Fill `outs` with the rotated query [B, H, T, D] and key [B, G, T, D]; cos and sin [B or 1, T, D], one layout.

    Any strides whose last one is 1. `inverse`: the transposed rotation, which takes gradients back.
    """
    query, key = pair
    batch, _, tokens, width = query.shape
    if not query.numel():
        return
    strides = [tensor.stride(dim) for tensor in (*pair, *outs) for dim in (0, 2, 1)]
    cos_row = cos.stride(0) if cos.shape[0] > 1 else 0
    parts = triton.cdiv(query.shape[1], HEADS) + triton.cdiv(key.shape[1], HEADS)
    _rotate_pair[(batch * tokens, parts)](
        *pair, *outs, cos, sin, tokens, width // 2, query.shape[1], key.shape[1], *strides, cos_row, cos.stride(1),
        INVERSE=inverse, HALF=triton.next_power_of_2(width // 2), HEADS=HEADS, num_warps=4,
    )  # fmt: skip
