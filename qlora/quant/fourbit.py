"""The base class of the 4-bit quantizers. Imports torch only to quantize: the planner counts bytes without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qlora.quant.block_sizes import NESTED_BLOCK

if TYPE_CHECKING:
    from torch import Tensor

    from qlora.quant.fourbit_linear import FourBitLinear


@dataclass(frozen=True)
class FourBit:
    """NF4 and FP4: each block of weights has one absmax, each weight is the code of its nearest level."""

    kind: ClassVar[str]

    double: bool  # absmax in 8 bits too: 4.127 bits a weight instead of 4.5 (block 64)
    block: int  # weights that share one absmax; smaller is more exact and takes more bytes

    def quantize(self, weight: "Tensor", bias: "Tensor | None" = None) -> "FourBitLinear":
        """The frozen layer of a weight [O, I], quantized on its device; equal to bitsandbytes bit for bit.

        BaseModelError if the weight is not a finite float32, bfloat16 or float16 matrix.
        """
        from qlora.quant.fourbit_linear import quantize

        return quantize(self.kind, self.double, self.block, weight, bias)

    @staticmethod
    def restore(description: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> "FourBitLinear":
        """The layer with this `describe()` and these parameters, bit for bit."""
        from qlora.quant.fourbit_linear import restore

        return restore(description, tensors)

    def stored_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes of the frozen tensors of a weight [O, I], bias left out; the same for 16-bit and 32-bit weights."""
        weights = out_features * in_features
        blocks = -(-weights // self.block)
        codes = -(-weights // 2)
        return codes + (blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if self.double else 4 * blocks)

    def scratch_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """W, and with double quantization absmax in float32 before and after its offset is added."""
        weights = out_features * in_features
        return weights * dtype_bytes + (8 * -(-weights // self.block) if self.double else 0)
