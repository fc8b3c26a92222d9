"""How the frozen base model is stored.

A quantizer turns a weight [O, I] into a FrozenLinear. Whatever the storage, a FrozenLinear does two things: forward(x),
and weight(dtype), which rebuilds W. Adapters use nothing else, so every kind here works with every kind of adapter.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from qlora.config import KindOf, Section, setting
from qlora.quant.block_sizes import Block
from qlora.utils.registry import Registry

if TYPE_CHECKING:  # a quantizer counts bytes without importing torch
    from torch import Tensor

    from qlora.quant.linear import FrozenLinear

QUANTIZERS = Registry(
    "quant.kind",
    nf4="qlora.quant.nf4:Nf4",  # 16 levels at the quantiles of a normal     arXiv:2305.14314
    fp4="qlora.quant.fp4:Fp4",  # 16 levels of a 4-bit float, E2M1           arXiv:2305.14314
    dense="qlora.quant.dense:Dense",  # 16 or 32 bit, not quantized: plain LoRA, and the reference
)


class Quant(Section):
    """How the frozen base model is stored."""

    kind: Annotated[str, KindOf(QUANTIZERS)] = setting(
        "nf4", "nf4 | fp4 | dense (16 bit: plain LoRA, and the reference)"
    )
    double: bool = setting(True, "store the blocks' scales in 8 bits too: 4.13 bits a weight, not 4.5", nullable=True)
    block: Block = setting(64, "weights that share one scale", nullable=True)

    def without_effect(self) -> Mapping[str, str]:
        """A dense matrix has no blocks."""
        return dict.fromkeys(("double", "block"), "quant.kind dense stores no blocks") if self.kind == "dense" else {}


class Quantizer(Protocol):
    """What a class of QUANTIZERS provides."""

    def quantize(self, weight: "Tensor", bias: "Tensor | None" = None) -> "FrozenLinear":
        """The frozen layer of a weight [O, I]. BaseModelError if it is not a finite float matrix."""

    @staticmethod
    def restore(description: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> "FrozenLinear":
        """The frozen layer that has this `describe()` and these parameters: read from a cache or from another rank."""

    def stored_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes of the frozen tensors of a weight [O, I] that came in a type of `dtype_bytes` bytes; no bias."""

    def scratch_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that exist only while W is rebuilt in a type of `dtype_bytes` bytes, W included."""


def build_quantizer(section: Quant) -> Quantizer:
    """The quantizer of a recipe's section."""
    unused = section.without_effect()
    settings = {key: getattr(section, key) for key in ("double", "block") if key not in unused}
    quantizer: Quantizer = QUANTIZERS[section.kind](**settings)
    return quantizer
