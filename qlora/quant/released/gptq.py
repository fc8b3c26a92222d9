"""GPTQ: codes of 2, 3, 4 or 8 bits along the inputs, packed into int32, lowest bits first. arXiv:2210.17323.

    X.qweight  int32 [I * bits / 32, O]
    X.qzeros   int32 [G, O * bits / 32]; layout `gptq` stores zero - 1, layout `gptq_v2` the zero itself
    X.scales   float16 [G, O]
    X.g_idx    int32 [I], the group of each input (activation order); missing: groups of I / G inputs

W = (code - zero) * scale, rounded to the scale's dtype. A field of 3 bits may continue in the next word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qlora.quant.released.bit_fields import WORD, unpack, words_for
from qlora.quant.released.column_groups import by_column, group_index, groups_in_files
from qlora.quant.released.released_tensor import (
    FLOATS,
    WORDS,
    ReleasedTensor,
    Rows,
    StoredFiles,
    check_dtypes,
    companion,
    misfit,
)
from qlora.quant.released.settings import QuantizationSettings

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq(ReleasedTensor):
    """Codes are unsigned integers with a zero point for each group."""

    kind: ClassVar[str] = "gptq"

    bits: int
    stores_zeros: bool  # layout gptq_v2; False: the stored zeros are one too low

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "Gptq | None":
        """`qweight` of a checkpoint whose config.json names GPTQ; the shapes tell the bits."""
        if settings.packed != "gptq" or not key.endswith(".qweight"):
            return None
        name = key.removesuffix("qweight")
        scale, zero = (companion(key, files, [f"{name}{part}"]) for part in ("scales", "qzeros"))
        scales, zeros, shape = files.shape(scale), files.shape(zero), files.shape(key)
        check_dtypes([key, zero], files, WORDS)
        check_dtypes([scale], files, FLOATS)
        if len(shape) != 2:
            raise misfit(key, shape, "[in * bits / 32, out]")
        if len(scales) != 2 or scales[1] != shape[1] or not scales[0]:
            raise misfit(scale, scales, f"[groups, {shape[1]}]")
        bits = next(
            (bits for bits in (*settings.bits, *BITS) if zeros == (scales[0], words_for(scales[1], bits))), None
        )
        if bits is None or shape[0] * WORD % bits:
            raise misfit(zero, zeros, f"[{scales[0]}, {scales[1]} * bits / 32] with bits one of {list(BITS)}")
        in_features = shape[0] * WORD // bits
        groups = groups_in_files(f"{name}g_idx", files, in_features)
        if not groups and in_features % scales[0]:
            raise misfit(scale, scales, f"groups that divide {in_features} inputs")
        parts = {"codes": key, "scale": scale, "zero": zero, **groups}
        return cls(f"{name}weight", parts, None, (shape[1], in_features), bits, settings.layout == "gptq_v2")

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """W = (code - zero) * scale in float32: the product is exact until it is rounded."""
        codes, dtype, in_features = tensors["codes"], tensors["scale"].dtype, self.matrix[1]
        scale = self.finite("scale", tensors["scale"]).t().contiguous()
        zeros = self._zeros(tensors["zero"]).t().float().contiguous()
        groups = group_index(self, tensors, scale.shape[1])

        def decode(part: slice) -> Tensor:
            values = unpack(codes[:, part].t().contiguous(), self.bits, in_features).float()
            values -= by_column(zeros[part], groups, in_features)
            return (values * by_column(scale[part], groups, in_features)).to(dtype)

        return decode

    def _zeros(self, words: Tensor) -> Tensor:
        """The zero points, int32 [G, O]. The +1 carries into the next field, as the -1 of the writer borrowed."""
        if not self.stores_zeros and WORD % self.bits == 0:
            ones = sum(1 << shift for shift in range(0, WORD, self.bits))
            words = (words.long() + ones).int()
        zeros = unpack(words, self.bits, self.matrix[0])
        return zeros if self.stores_zeros or WORD % self.bits == 0 else (zeros + 1) & (2**self.bits - 1)
