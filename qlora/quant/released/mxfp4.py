"""MXFP4: pairs of 4-bit floats (e2m1) in a byte, and a power of two for every 32 weights of a row.

    X_blocks         uint8 [E, O, I/32, 16]; X_scales uint8 [E, O, I/32]: gpt-oss, read as X [E, I, O]
    X.weight_packed  uint8 [O, I/2]; X.weight_scale uint8 [O, I/32]: compressed-tensors
    X.weight         int8 or uint8 [O, I/2]; X.weight_scale(_inv) or X.scale e8m0 [O, I/32]: DeepSeek

W = e2m1(code) * 2^(scale - 127). OCP Microscaling Formats v1.0. gpt-oss keeps its matrices transposed in 16 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora.quant.released.bit_fields import e2m1, power_of_two
from qlora.quant.released.released_tensor import (
    EXPONENTS,
    ReleasedTensor,
    Rows,
    StoredFiles,
    check_dtypes,
    check_shape,
    companion,
    misfit,
)
from qlora.quant.released.settings import QuantizationSettings

BLOCK = 32  # weights that share a scale


@dataclass(frozen=True)
class Mxfp4(ReleasedTensor):
    """Codes are e2m1 floats, scales are exponents."""

    kind: ClassVar[str] = "mxfp4"

    transposed: bool = False  # read as [I, O]

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "Mxfp4 | None":
        """`_blocks` of experts, or bytes with exponents beside them."""
        if key.endswith("_blocks") and files.dtype(key) == "U8":
            return cls._stack(key, files)
        if files.dtype(key) not in ("U8", "I8"):
            return None
        scale = next((name for name in _scale_names(key) if name in files), None)
        if scale is None or files.dtype(scale) not in EXPONENTS or len(files.shape(key)) not in (2, 3):
            return None
        *stack, out_features, pairs = files.shape(key)
        check_shape(scale, files, [*stack, out_features, 2 * pairs // BLOCK], f"(blocks of {BLOCK} of {key!r})")
        matrix = (out_features, 2 * pairs)
        return cls(_decoded(key), {"codes": key, "scale": scale}, stack[0] if stack else None, matrix)

    @classmethod
    def _stack(cls, key: str, files: StoredFiles) -> "Mxfp4":
        name, shape = key.removesuffix("_blocks"), files.shape(key)
        if len(shape) != 4 or shape[3] != BLOCK // 2:
            raise misfit(key, shape, f"[experts, out, in / {BLOCK}, {BLOCK // 2}]")
        scale = companion(key, files, [f"{name}_scales"])
        check_dtypes([scale], files, EXPONENTS)
        check_shape(scale, files, shape[:3], f"(a scale for each block of {key!r})")
        return cls(name, {"codes": key, "scale": scale}, shape[0], (shape[1], shape[2] * BLOCK), transposed=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is read."""
        matrix = self.matrix[::-1] if self.transposed else self.matrix
        return matrix if self.stack is None else (self.stack, *matrix)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """One matrix in `dtype`: [I, O] if it is read transposed, else [O, I]."""
        matrix = super().dequantize(tensors, dtype)
        return matrix.t().contiguous() if self.transposed else matrix

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """W = e2m1(code) * 2^(scale - 127) in float32: exact."""
        codes = tensors["codes"].flatten(1).view(torch.uint8)
        scale = self.finite("scale", power_of_two(tensors["scale"]))

        def decode(part: slice) -> Tensor:
            values = e2m1(codes[part])
            return (values.view(len(values), -1, BLOCK) * scale[part].unsqueeze(-1)).flatten(1)

        return decode


def _scale_names(key: str) -> tuple[str, ...]:
    if key.endswith("_packed"):
        return (f"{key.removesuffix('_packed')}_scale",)
    return (f"{key}_scale_inv", f"{key}_scale", f"{key.removesuffix('weight')}scale")


def _decoded(key: str) -> str:
    return key.removesuffix("_packed")
