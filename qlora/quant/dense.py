"""The frozen weight as stored in the checkpoint, 16 or 32 bit: plain LoRA, and the reference for the other kinds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # counting bytes needs no torch
    from torch import Tensor

    from qlora.quant.dense_linear import DenseLinear


@dataclass(frozen=True)
class Dense:
    """W without quantization; no error."""

    def quantize(self, weight: "Tensor", bias: "Tensor | None" = None) -> "DenseLinear":
        """The frozen layer of a weight [O, I]. BaseModelError if it is not a finite float matrix."""
        from qlora.quant.dense_linear import DenseLinear
        from qlora.quant.linear import check_matrix

        check_matrix(weight)
        return DenseLinear(weight, bias)

    @staticmethod
    def restore(description: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> "DenseLinear":
        """The layer with these parameters."""
        from qlora.quant.dense_linear import DenseLinear

        return DenseLinear(tensors["dense"], tensors.get("bias"))

    def stored_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes of W [O, I] in a type of `dtype_bytes` bytes."""
        return out_features * in_features * dtype_bytes

    def scratch_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Zero: W in its stored type is the stored tensor."""
        return 0
