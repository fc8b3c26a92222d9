"""The frozen weight as it came, 16 or 32 bit: plain LoRA, and the reference the other kinds are tested against."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.quant.linear import FrozenLinear, check_matrix, frozen


class DenseLinear(FrozenLinear):
    """y = x W^T + bias with W [O, I] stored in the type it came in."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.dense = frozen(weight)

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype`; the stored tensor itself when that is its type."""
        return self.stored()["dense"].to(dtype)

    def describe(self) -> dict[str, Any]:
        """Kind, shape and type."""
        dtype = str(self.dense.dtype).removeprefix("torch.")
        return {"kind": "dense", "shape": [self.out_features, self.in_features], "dtype": dtype}


@dataclass(frozen=True)
class Dense:
    """W kept as it came; no error."""

    def quantize(self, weight: Tensor, bias: Tensor | None = None) -> DenseLinear:
        """The frozen layer of a weight [O, I]. BaseModelError if it is not a finite float matrix."""
        check_matrix(weight)
        return DenseLinear(weight, bias)

    def stored_bytes(self, out_features: int, in_features: int, dtype_bytes: int = 2) -> int:
        """Bytes of W [O, I] in a type of `dtype_bytes` bytes."""
        return out_features * in_features * dtype_bytes
