"""Dequantisation on a CUDA card: our fused kernel where it gives bitsandbytes' bits in less time, else theirs.

Proved and measured once for each device, kind, block and type, on random weights; nothing is taken on trust.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.quant.blockwise import dynamic_levels

PROOF_SHAPE = (2048, 4096)  # of the random matrix that both rebuild
RUNS = 20  # of each, after as many to warm up


class Form(NamedTuple):
    """How a matrix is stored and what it is rebuilt to."""

    kind: str
    block: int
    dtype: torch.dtype


Rebuild = Callable[[Sequence[Tensor], Sequence[int], Form], Tensor]  # (stored, shape [O, I], form) -> W


def pick(stored: Sequence[Tensor], form: Form, theirs: Rebuild) -> Rebuild:
    """The faster of two functions that give the same bits; `theirs` where there is no Triton."""
    return _ours if _ours_is_better(stored[0].device, len(stored), form, theirs) else theirs


def _ours(stored: Sequence[Tensor], shape: Sequence[int], form: Form) -> Tensor:
    fused = import_module("qlora.quant.triton_kernel")
    out = torch.empty(*shape, dtype=form.dtype, device=stored[0].device)
    absmax_levels = stored[4] if len(stored) > 4 else _levels("absmax", out.device)
    fused.dequantize(stored[:4], form.block, _levels(form.kind, out.device), absmax_levels, out)
    return out


@cache
def _ours_is_better(device: torch.device, tensors: int, form: Form, theirs: Rebuild) -> bool:
    if find_spec("triton") is None:
        return False
    stored = random_matrix(PROOF_SHAPE, form.block, device)[:tensors]
    if not torch.equal(_ours(stored, PROOF_SHAPE, form), theirs(stored, PROOF_SHAPE, form)):
        return False
    return _seconds(_ours, stored, form) < _seconds(theirs, stored, form)


def random_matrix(shape: tuple[int, int], block: int, device: torch.device) -> list[Tensor]:
    """Random codes, absmax codes, nested absmax, offset and absmax levels of a double-quantised [O, I]."""
    generator = torch.Generator().manual_seed(0)
    weights = shape[0] * shape[1]
    blocks = -(-weights // block)
    made = [
        torch.randint(256, (-(-weights // 2),), dtype=torch.uint8, generator=generator),
        torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator),
        torch.rand(-(-blocks // 256), generator=generator),
        torch.rand(1, generator=generator),
        dynamic_levels(),
    ]
    return [each.to(device) for each in made]


def _seconds(rebuild: Rebuild, stored: Sequence[Tensor], form: Form) -> float:
    """Time on the card for RUNS calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    for _ in range(RUNS):
        rebuild(stored, PROOF_SHAPE, form)
    begin.record()
    for _ in range(RUNS):
        rebuild(stored, PROOF_SHAPE, form)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


@cache
def _levels(kind: str, device: torch.device) -> Tensor:
    made: Tensor = dynamic_levels() if kind == "absmax" else import_module(f"qlora.quant.{kind}").levels()
    return made.to(device)
