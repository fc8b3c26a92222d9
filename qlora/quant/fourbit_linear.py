"""A frozen layer in 4 bits: the tensors that it stores, and the quantization that fills them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from qlora.quant.linear import FrozenLinear, check_matrix, frozen


@dataclass(frozen=True)
class FourBitTensors:
    """The stored tensors of W [O, I] in 4 bits; the last three are None without double quantization."""

    codes: Tensor  # uint8 [ceil(O*I/2)], two weights a byte, high nibble first
    absmax: Tensor  # float32 [N], or with double quantization its codes, uint8 [N]
    nested_absmax: Tensor | None = None  # float32 [ceil(N/256)]
    offset: Tensor | None = None  # float32 [1], the mean of absmax
    absmax_levels: Tensor | None = None  # float32 [256]; None: those of the dynamic 8-bit type


class FourBitLinear(FrozenLinear):
    """y = x W^T + bias, W[i] = levels[code[i]] * absmax[i // block], over W flattened row by row.

    With double quantization absmax[n] = absmax_levels[absmax code[n]] * nested_absmax[n // 256] + offset.
    """

    codes: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    offset: nn.Parameter | None
    absmax_levels: nn.Parameter | None
    keeps_weight = False  # whether the next W is kept, see kept_weights.py
    kept_weight: Tensor | None = None

    def __init__(
        self, kind: str, block: int, shape: tuple[int, int], stored: FourBitTensors, bias: Tensor | None = None
    ) -> None:
        # Registers the operator. Imported late, since bitsandbytes takes seconds to import.
        from qlora.quant import bitsandbytes_ops  # noqa: F401

        super().__init__(*shape, bias)
        self.kind = kind
        self.block = block
        for name in ("codes", "absmax", "nested_absmax", "offset", "absmax_levels"):
            tensor = getattr(stored, name)
            self.register_parameter(name, None if tensor is None else frozen(tensor))

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype` (float32, bfloat16 or float16), dequantized in float32 and rounded once."""
        if self.kept_weight is not None and self.kept_weight.dtype == dtype:
            return self.kept_weight
        stored = list(self.stored().values())
        shape = (self.out_features, self.in_features)
        weight: Tensor = torch.ops.qlora.dequantize_4bit.default(stored, self.block, self.kind, shape, dtype, after)
        if self.keeps_weight:
            self.kept_weight = weight
        return weight

    def describe(self) -> dict[str, Any]:
        """Kind, shape, block and double quantization."""
        shape, double = [self.out_features, self.in_features], self.nested_absmax is not None
        return {"kind": self.kind, "shape": shape, "block": self.block, "double": double}


def quantize(kind: str, double: bool, block: int, weight: Tensor, bias: Tensor | None) -> FourBitLinear:
    """The frozen layer of a weight [O, I]. BaseModelError if it is not a finite float matrix."""
    from qlora.quant import bitsandbytes_ops

    check_matrix(weight)
    with torch.no_grad():
        codes, absmax = bitsandbytes_ops.quantize(weight, kind, block)
        stored = FourBitTensors(codes, absmax)
        if double:
            stored = FourBitTensors(codes, *bitsandbytes_ops.quantize_absmax(absmax))
    return FourBitLinear(kind, block, (weight.shape[0], weight.shape[1]), stored, bias)


def restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FourBitLinear:
    """The layer with this `describe()` and these parameters."""
    names = [field.name for field in fields(FourBitTensors)]
    stored = FourBitTensors(**{name: tensors[name] for name in names if name in tensors})
    rows, columns = description["shape"]
    return FourBitLinear(description["kind"], description["block"], (rows, columns), stored, tensors.get("bias"))
