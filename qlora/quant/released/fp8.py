"""FP8: 8-bit floats with scales of blocks (DeepSeek, Qwen), rows, or the whole tensor (Ministral, modelopt).

    X.weight            float8_e4m3fn or e5m2 [O, I]; a stack of experts [E, O, I]
    X.weight_scale_inv  [O/128, I/128] or one number; also as X.scale and X.qscale_weight
    X.weight_scale      [O, 1], [O], one number or blocks (compressed-tensors, modelopt, fbgemm); MXFP8: e8m0 [O, I/32]

W = code * scale, whatever the name of the scale. A last block may be shorter (DeepSeek's kv_a_proj has 576 rows).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora.quant.released.bit_fields import floats8, power_of_two
from qlora.quant.released.released_tensor import (
    EXPONENTS,
    FLOATS,
    ReleasedTensor,
    Rows,
    StoredFiles,
    check_dtypes,
    misfit,
)
from qlora.quant.released.scale_grid import ScaleGrid, one_of_stack
from qlora.quant.released.settings import QuantizationSettings

CODES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Fp8(ReleasedTensor):
    """Codes are the bits of 8-bit floats."""

    kind: ClassVar[str] = "fp8"

    grid: ScaleGrid
    rounds_to_scale: bool  # the product is rounded to the scale's dtype first, as compressed-tensors does

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "Fp8 | None":
        """Float8 with a scale beside it; without one None, which loading reports."""
        if files.dtype(key) not in CODES:
            return None
        stem = key.removesuffix("weight")
        names = (f"{key}_scale_inv", f"{key}_scale", f"{stem}scale", f"{stem}qscale_weight")
        scale = next((name for name in names if name in files), None)
        if scale is None:
            return None
        check_dtypes([scale], files, (*FLOATS, *EXPONENTS))
        *stack, out_features, in_features = _matrix_or_stack(key, files.shape(key))
        count = stack[0] if stack else None
        shape = one_of_stack(scale, files.shape(scale), count)
        grid = ScaleGrid.fit(scale, shape, (out_features, in_features), settings.blocks)
        rounds = scale.endswith("_scale") and files.dtype(scale) not in EXPONENTS
        return cls(key, {"codes": key, "scale": scale}, count, (out_features, in_features), grid, rounds)

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """W = code * scale in float32."""
        codes, stored = tensors["codes"], tensors["scale"]
        scale = self.finite("scale", stored_scale(stored))
        dtype = stored.dtype if self.rounds_to_scale else torch.float32
        return lambda part: (floats8(codes[part]) * self.grid.spread(scale, part)).to(dtype)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as numbers: floats as they are, bytes as exponents of two."""
    return power_of_two(scale) if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else scale


def _matrix_or_stack(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) not in (2, 3):
        raise misfit(key, shape, "[out, in], or [experts, out, in]")
    return shape
