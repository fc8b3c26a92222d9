"""Integers of up to 8 bits in a byte each: compressed-tensors' `int-quantized`, and `naive-quantized` of integers.

    X.weight             int8 [O, I]; a stack of experts [E, O, I]
    X.weight_scale       [O, G], [O, 1], blocks, or one number
    X.weight_zero_point  int8, of the scale's shape; missing: 0

W = (code - zero point) * scale, rounded to the scale's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qlora.quant.released.released_tensor import FLOATS, ReleasedTensor, Rows, StoredFiles, check_dtypes, check_shape
from qlora.quant.released.scale_grid import ScaleGrid, one_of_stack
from qlora.quant.released.settings import QuantizationSettings


@dataclass(frozen=True)
class IntQuantized(ReleasedTensor):
    """Codes are signed integers."""

    kind: ClassVar[str] = "int_quantized"

    grid: ScaleGrid

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "IntQuantized | None":
        """Bytes with floats beside them as scales."""
        scale = f"{key}_scale"
        if files.dtype(key) != "I8" or scale not in files or files.dtype(scale) not in FLOATS:
            return None
        if len(files.shape(key)) not in (2, 3):
            return None
        *stack, out_features, in_features = files.shape(key)
        count, matrix = stack[0] if stack else None, (out_features, in_features)
        shape = one_of_stack(scale, files.shape(scale), count)
        grid = ScaleGrid.fit(scale, shape, matrix, settings.blocks)
        parts = {"codes": key, "scale": scale}
        if f"{key}_zero_point" in files:
            parts["zero"] = f"{key}_zero_point"
            check_dtypes([parts["zero"]], files, ("I8",))
            check_shape(parts["zero"], files, files.shape(scale), f"(that of {scale!r})")
        return cls(key, parts, count, matrix, grid)

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """W = (code - zero point) * scale in float32: the product is exact until it is rounded."""
        codes, scale = tensors["codes"], self.finite("scale", tensors["scale"])
        dtype, zeros = tensors["scale"].dtype, tensors.get("zero")

        def decode(part: slice) -> Tensor:
            values = codes[part].float()
            if zeros is not None:
                values -= self.grid.spread(zeros.float(), part)
            return (values * self.grid.spread(scale, part)).to(dtype)

        return decode
