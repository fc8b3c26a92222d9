"""AWQ in the `gemm` layout: 4-bit codes along the outputs, 8 in an int32 in an interleaved order. arXiv:2306.00978.

    X.qweight  int32 [I, O/8]; nibble n of a word, lowest first, is its output (0, 2, 4, 6, 1, 3, 5, 7)[n]
    X.qzeros   int32 [G, O/8], in the same order
    X.scales   float16 [G, O]

W = (code - zero) * scale, rounded to the scale's dtype; groups of I / G inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora.quant.released.column_groups import by_column
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
from qlora.quant.released.settings import QuantizationSettings

PACKED = 8  # codes in an int32
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of outputs 0 to 7 of a word, in bits


@dataclass(frozen=True)
class Awq(ReleasedTensor):
    """Codes are unsigned integers with a zero point for each group."""

    kind: ClassVar[str] = "awq"

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "Awq | None":
        """`qweight` of a checkpoint whose config.json names AWQ."""
        if settings.packed != "awq" or not key.endswith(".qweight"):
            return None
        name = key.removesuffix("qweight")
        scale, zero = (companion(key, files, [f"{name}{part}"]) for part in ("scales", "qzeros"))
        check_dtypes([key, zero], files, WORDS)
        check_dtypes([scale], files, FLOATS)
        shape, scales = files.shape(key), files.shape(scale)
        if len(shape) != 2:
            raise misfit(key, shape, f"[in, out / {PACKED}]")
        in_features, out_features = shape[0], shape[1] * PACKED
        if len(scales) != 2 or scales[1] != out_features or not scales[0] or in_features % scales[0]:
            raise misfit(scale, scales, f"[groups, {out_features}], with groups that divide {in_features} inputs")
        check_shape(zero, files, (scales[0], shape[1]), "(a zero point for each group and output)")
        return cls(f"{name}weight", {"codes": key, "scale": scale, "zero": zero}, None, (out_features, in_features))

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """W = (code - zero) * scale in float32: the product is exact until it is rounded."""
        codes, dtype = tensors["codes"], tensors["scale"].dtype
        scale = self.finite("scale", tensors["scale"]).t().contiguous()
        zeros = _outputs_first(tensors["zero"]).float()

        def decode(part: slice) -> Tensor:
            values = _outputs_first(codes[:, part.start // PACKED : part.stop // PACKED]).float()
            values -= by_column(zeros[part], None, self.matrix[1])
            return (values * by_column(scale[part], None, self.matrix[1])).to(dtype)

        return decode


def _outputs_first(words: Tensor) -> Tensor:
    """The codes of words: int32 [I, N/8] -> int32 [N, I]."""
    shifts = torch.tensor(SHIFTS, dtype=torch.int32).view(1, PACKED, 1)
    return ((words.t().contiguous().unsqueeze(1) >> shifts) & 15).flatten(0, 1)
