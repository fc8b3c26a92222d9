"""Registration of fused kernels as operators of torch, so that FakeTensor, meta tensors and autograd see one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Implementation = Callable[..., Any]


def register(
    name: str, schema: str, on_cpu: Implementation, on_gpu: Implementation, empty: Implementation | None = None
) -> None:
    """Register `qlora::name`: its reference for the CPU, its kernel for a GPU, and `empty`, which allocates its result.

    Without `empty` the operator returns nothing: it fills arguments that its schema marks.
    """
    torch.library.define(f"qlora::{name}", schema)
    torch.library.impl(f"qlora::{name}", "cpu", on_cpu)
    torch.library.impl(f"qlora::{name}", "cuda", on_gpu)
    torch.library.register_fake(f"qlora::{name}", empty or _return_nothing)


def contiguous_rows(tensor: Tensor) -> Tensor:
    """[..., I] as [N, I] with contiguous rows; a copy only where strides demand it."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _return_nothing(*_: Any) -> None:
    return None
