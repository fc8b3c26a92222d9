"""NVFP4: pairs of 4-bit floats (e2m1) in a byte, an FP8 scale for every 16 weights of a row, and one for the tensor.

    X.weight_packed  uint8 [O, I/2]; X.weight_scale e4m3 [O, I/16]; X.weight_global_scale float32, divides
    X.weight         uint8 [O, I/2]; X.weight_scale e4m3 [O, I/16]; X.weight_scale_2 float32, multiplies

The first are compressed-tensors' names, W = e2m1(code) * (scale / global_scale) in bfloat16; the second modelopt's,
W = e2m1(code) * (scale * scale_2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from qlora.quant.released.bit_fields import e2m1
from qlora.quant.released.released_tensor import (
    FLOATS,
    ReleasedTensor,
    Rows,
    StoredFiles,
    check_dtypes,
    check_shape,
    companion,
    misfit,
)
from qlora.quant.released.scale_grid import one_of_stack
from qlora.quant.released.settings import QuantizationSettings

BLOCK = 16  # weights that share a scale


@dataclass(frozen=True)
class Nvfp4(ReleasedTensor):
    """Codes are e2m1 floats, scales are 8-bit floats."""

    kind: ClassVar[str] = "nvfp4"

    divides: bool  # compressed-tensors' global scale

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "Nvfp4 | None":
        """Bytes with 8-bit floats beside them as scales."""
        name, divides = key.removesuffix("_packed"), key.endswith("_packed")
        scale = f"{name}_scale"
        if files.dtype(key) != "U8" or not (key.endswith("weight_packed") or scale in files):
            return None
        companion(key, files, [scale])
        if files.dtype(scale) != "F8_E4M3":
            return None
        whole = companion(key, files, [f"{name}_global_scale" if divides else f"{name}_scale_2"])
        check_dtypes([whole], files, FLOATS)
        if len(files.shape(key)) not in (2, 3):
            raise misfit(key, files.shape(key), "[out, in / 2], or [experts, out, in / 2]")
        *stack, out_features, pairs = files.shape(key)
        check_shape(scale, files, [*stack, out_features, 2 * pairs // BLOCK], f"(blocks of {BLOCK} of {key!r})")
        count = stack[0] if stack else None
        if prod(one_of_stack(whole, files.shape(whole), count)) != 1:
            raise misfit(whole, files.shape(whole), "one number for each matrix")
        parts = {"codes": key, "scale": scale, "whole": whole}
        return cls(name, parts, count, (out_features, 2 * pairs), divides)

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """The scales are combined first, in float32."""
        codes, whole = tensors["codes"], self.finite("whole", tensors["whole"]).reshape(())
        scale = self.finite("scale", tensors["scale"])
        combined = self.finite("whole", scale / whole if self.divides else scale * whole)
        dtype = torch.bfloat16 if self.divides else torch.float32

        def decode(part: slice) -> Tensor:
            values = e2m1(codes[part])
            return (values.view(len(values), -1, BLOCK) * combined[part].unsqueeze(-1)).flatten(1).to(dtype)

        return decode
