"""A frozen layer whose weight is not quantized."""

from typing import Any

import torch
from torch import Tensor

from qlora.quant.linear import FrozenLinear, frozen


class DenseLinear(FrozenLinear):
    """y = x W^T + bias with W [O, I] stored in its original type."""

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
