"""How the frozen base is stored.

A quantiser turns a weight [O, I] into a FrozenLinear. Whatever the storage, a FrozenLinear can do two things: run
forward(x), and rebuild weight(dtype). Adapters rely on nothing else, so any kind here works with any kind there.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from qlora.config import KindOf, Section, setting
from qlora.utils.registry import Registry

QUANTIZERS = Registry(
    "quant.kind",
    nf4="qlora.quant.nf4:Nf4",  # 16 levels at the quantiles of a normal     arXiv:2305.14314
    fp4="qlora.quant.fp4:Fp4",  # 16 levels of a 4-bit float, E2M1           arXiv:2305.14314
    dense="qlora.quant.dense:Dense",  # 16 or 32 bit, as it came: plain LoRA, and the reference
)


class Quant(Section):
    """How the frozen base is stored."""

    kind: Annotated[str, KindOf(QUANTIZERS)] = setting(
        "nf4", "nf4 | fp4 | dense (16 bit: plain LoRA, and the reference)"
    )
    double: bool = setting(True, "store the blocks' scales in 8 bits too: 4.13 bits a weight, not 4.5", unsaid=True)
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = setting(64, "weights that share one scale", unsaid=True)

    def idle(self) -> Mapping[str, str]:
        """Without codes there are no blocks."""
        return dict.fromkeys(("double", "block"), "quant.kind dense stores no blocks") if self.kind == "dense" else {}


def build(section: Quant) -> Any:
    """The quantiser that the section asks for: quantize(weight [O, I], bias) -> FrozenLinear, and stored_bytes."""
    settings = {key: getattr(section, key) for key in ("double", "block") if key not in section.idle()}
    return QUANTIZERS[section.kind](**settings)
