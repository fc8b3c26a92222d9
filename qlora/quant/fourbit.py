"""A weight in 4 bits: the layer that holds it and what all 4-bit quantisers share."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.quant.linear import FrozenLinear, check_matrix, frozen

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes' kernels know
NESTED_BLOCK = 256  # absmax values that share one nested absmax


@dataclass(frozen=True)
class FourBitTensors:
    """What is stored of W [O, I] in 4 bits; the last three are None without double quantisation."""

    codes: Tensor  # uint8 [ceil(O*I/2)], two weights a byte, high nibble first
    absmax: Tensor  # float32 [N], or with double quantisation its codes, uint8 [N]
    nested_absmax: Tensor | None = None  # float32 [ceil(N/256)]
    offset: Tensor | None = None  # float32 [1], the mean of absmax
    absmax_levels: Tensor | None = None  # float32 [256]; None: the dynamic 8-bit type's own


class FourBitLinear(FrozenLinear):
    """y = x W^T + bias, W[i] = levels[code[i]] * absmax[i // block], over W flattened row by row.

    With double quantisation absmax[n] = absmax_levels[absmax code[n]] * nested_absmax[n // 256] + offset.
    """

    codes: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    offset: nn.Parameter | None
    absmax_levels: nn.Parameter | None

    def __init__(
        self, kind: str, block: int, shape: tuple[int, int], stored: FourBitTensors, bias: Tensor | None = None
    ) -> None:
        super().__init__(*shape, bias)
        import_module(
            "qlora.quant.bitsandbytes_ops"
        )  # registers the operator; not before, bitsandbytes takes seconds to import
        self.kind = kind
        self.block = block
        for name in ("codes", "absmax", "nested_absmax", "offset", "absmax_levels"):
            tensor = getattr(stored, name)
            self.register_parameter(name, None if tensor is None else frozen(tensor))

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype` (float32, bfloat16 or float16), dequantised in float32 and rounded once."""
        stored = list(self.stored().values())
        shape = (self.out_features, self.in_features)
        weight: Tensor = torch.ops.qlora.dequantize_4bit.default(stored, self.block, self.kind, shape, dtype, after)
        return weight

    def describe(self) -> dict[str, Any]:
        """Kind, shape, block and double quantisation."""
        shape, double = [self.out_features, self.in_features], self.nested_absmax is not None
        return {"kind": self.kind, "shape": shape, "block": self.block, "double": double}


@dataclass(frozen=True)
class FourBit:
    """What NF4 and FP4 share: each run of `block` weights has one absmax, each weight the code of its nearest level."""

    kind: ClassVar[str]

    double: bool = True  # absmax in 8 bits too: 4.127 bits a weight instead of 4.5 (block 64)
    block: int = 64  # weights that share one absmax; smaller is finer and takes more bytes

    def quantize(self, weight: Tensor, bias: Tensor | None = None) -> FourBitLinear:
        """The frozen layer of a weight [O, I], quantised on the device it lies on; equal to bitsandbytes bit for bit.

        BaseModelError if the weight is not a finite float32, bfloat16 or float16 matrix.
        """
        check_matrix(weight)
        kernels = import_module("qlora.quant.bitsandbytes_ops")
        with torch.no_grad():
            codes, absmax = kernels.quantize(weight, self.kind, self.block)
            stored = FourBitTensors(codes, absmax)
            if self.double:
                stored = FourBitTensors(codes, *kernels.quantize_absmax(absmax))
        return FourBitLinear(self.kind, self.block, (weight.shape[0], weight.shape[1]), stored, bias)

    def stored_bytes(self, out_features: int, in_features: int, dtype_bytes: int = 2) -> int:
        """Bytes of the frozen tensors of a weight [O, I], bias left out; the same whatever 16 or 32 bit it came in."""
        weights = out_features * in_features
        blocks = -(-weights // self.block)
        codes = -(-weights // 2)
        return codes + (blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if self.double else 4 * blocks)
