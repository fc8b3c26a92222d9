"""Integers of 1 to 8 bits packed into int32: compressed-tensors' `pack-quantized`.

    X.weight_packed      int32 [O, ceil(I * bits / 32)], codes + 2^(bits - 1), lowest bits first
    X.weight_scale       [O, G], [O, 1] or one number
    X.weight_shape       int64 [2]: O, I
    X.weight_zero_point  int32 [ceil(O * bits / 32), G], packed along dimension 0; missing: 0
    X.weight_g_idx       int32 [I], the group of each column; missing, or -1: groups of I / G columns

W = (code - zero point) * scale, rounded to the scale's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant.released.bit_fields import unpack, words_for
from qlora.quant.released.column_groups import by_column, group_index, groups_in_files
from qlora.quant.released.released_tensor import (
    FLOATS,
    WORDS,
    ReleasedTensor,
    Rows,
    StoredFiles,
    check_dtypes,
    check_shape,
    companion,
    misfit,
)
from qlora.quant.released.scale_grid import ScaleGrid
from qlora.quant.released.settings import QuantizationSettings

COMMON_BITS = (4, 8)  # where config.json names none


@dataclass(frozen=True)
class PackQuantized(ReleasedTensor):
    """Codes are signed integers, stored with an offset."""

    kind: ClassVar[str] = "pack_quantized"

    bits: int
    grid: ScaleGrid

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "PackQuantized | None":
        """`weight_packed` in int32."""
        if not key.endswith("_packed") or files.dtype(key) != "I32":
            return None
        name = key.removesuffix("_packed")
        parts = {"codes": key, "shape": companion(key, files, [f"{name}_shape"])}
        parts["scale"] = companion(key, files, [f"{name}_scale"])
        check_dtypes([parts["scale"]], files, FLOATS)
        matrix = _matrix(parts["shape"], files)
        bits = _bits(key, files, matrix, settings.bits or COMMON_BITS)
        grid = ScaleGrid.fit(parts["scale"], files.shape(parts["scale"]), matrix, ())
        if f"{name}_zero_point" in files:
            parts["zero"] = f"{name}_zero_point"
            check_dtypes([parts["zero"]], files, WORDS)
            groups = (words_for(matrix[0], bits), grid.shape[1])
            check_shape(parts["zero"], files, groups, f"({bits} bits a zero point, packed along dimension 0)")
        parts |= groups_in_files(f"{name}_g_idx", files, matrix[1])
        return cls(name, parts, None, matrix, bits, grid)

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """W = (code - zero point) * scale in float32: the product is exact until it is rounded."""
        codes, scale = tensors["codes"], self.finite("scale", tensors["scale"])
        dtype, offset = tensors["scale"].dtype, 1 << (self.bits - 1)
        groups = group_index(self, tensors, self.grid.shape[1])
        zeros = self._zeros(tensors["zero"]) if "zero" in tensors else None

        def columns(values: Tensor, part: slice) -> Tensor:
            if groups is None:
                return self.grid.spread(values, part)
            return by_column(values.reshape(self.grid.shape)[part], groups, self.matrix[1])

        def decode(part: slice) -> Tensor:
            values = unpack(codes[part], self.bits, self.matrix[1]).float()
            values -= offset if zeros is None else columns(zeros, part)
            return (values * columns(scale, part)).to(dtype)

        return decode

    def _zeros(self, packed: Tensor) -> Tensor:
        """The zero points, with the offset of the codes, float32 [O, G]."""
        return unpack(packed.t().contiguous(), self.bits, self.matrix[0]).t().float().contiguous()


def _matrix(key: str, files: StoredFiles) -> tuple[int, int]:
    """O, I as the tensor `weight_shape` says."""
    shape = files[key].tolist() if files.shape(key) == (2,) else None
    if shape is None or not all(isinstance(size, int) and 0 < size < 2**31 for size in shape):
        raise BaseModelError(f"{key!r} is {shape or list(files.shape(key))}, expected two sizes: [out, in].")
    return shape[0], shape[1]


def _bits(key: str, files: StoredFiles, matrix: tuple[int, int], allowed: tuple[int, ...]) -> int:
    """The bits of a code with which a row has the stored number of words."""
    for bits in allowed:
        if files.shape(key) == (matrix[0], words_for(matrix[1], bits)):
            return bits
    expected = " or ".join(f"{[matrix[0], words_for(matrix[1], bits)]} ({bits} bits)" for bits in allowed)
    raise misfit(key, files.shape(key), expected)
