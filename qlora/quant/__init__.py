"""How the frozen base model is stored.

A quantizer turns a weight [O, I] into a FrozenLinear. Whatever the storage, a FrozenLinear does two things: forward(x),
and weight(dtype), which rebuilds W. Adapters use nothing else, so every kind here works with every kind of adapter.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from qlora.config import Between, KindOf, Section, setting
from qlora.errors import RecipeError, did_you_mean
from qlora.quant.block_sizes import Block
from qlora.utils.byte_sizes import PERCENT, SIZE, share_bytes
from qlora.utils.name_patterns import matches
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

LITERAL, STACK_INDEX = re.compile(r"[\w.]+"), re.compile(r"\.\d+$")


def _compiles(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


Pattern = Annotated[str, Between(min_length=1)]
ShareOrBytes = (
    Annotated[float, Between(gt=0)]
    | Annotated[str, Between(pattern=PERCENT, max_length=30, examples=["5%"])]
    | Annotated[str, Between(pattern=SIZE, max_length=30, examples=["200MiB"])]
)


class Quant(Section):
    """How the frozen base model is stored."""

    kind: Annotated[str, KindOf(QUANTIZERS)] = setting(
        "nf4", "nf4 | fp4 | dense (16 bit: plain LoRA, and the reference)"
    )
    double: bool = setting(True, "store the blocks' scales in 8 bits too: 4.13 bits a weight, not 4.5", nullable=True)
    block: Block = setting(64, "weights that share one scale", nullable=True)

    keep: Literal["auto"] | tuple[Pattern, ...] = setting(
        (),
        "matrices that stay in 16 bits: names, ends of paths or expressions; auto: the best within keep_bytes",
        nullable=True,
    )
    keep_bytes: ShareOrBytes = setting(
        0.05,
        "what keep: auto may add to the packed base: a share of it (0.05, 5%), or bytes (200MiB); default 0.05",
        nullable=True,
    )

    def conflicts(self) -> Mapping[str, str]:
        """Settings without effect, and an expression that is none."""
        wrong = [f"{pattern!r}" for pattern in self.keep if self.keep != "auto" and not _compiles(pattern)]
        problem = {"keep": f"{wrong[0]} is not a regular expression. Write a name such as down_proj."} if wrong else {}
        return {**super().conflicts(), **problem}

    def without_effect(self) -> Mapping[str, str]:
        """A dense matrix has no blocks, and is in 16 bits anyway; named matrices have no budget."""
        if self.kind == "dense":
            keep = "with quant.kind dense every matrix stays in 16 bits"
            blocks = "quant.kind dense stores no blocks"
            return {"double": blocks, "block": blocks, "keep": keep, "keep_bytes": keep}
        return {} if self.keep == "auto" else {"keep_bytes": "it is the budget of quant.keep: auto"}


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


@dataclass(frozen=True)
class Keeping:
    """Keeps some matrices in the base's dtype, and stores all others as `others` does.

    `patterns` name them. `budget`: what a choice that is not made yet may add to the packed base; None: it is made.
    """

    others: Quantizer
    dense: Quantizer
    patterns: tuple[str, ...]
    budget: float | str | None = None

    @cached_property
    def _names(self) -> frozenset[str]:
        """Patterns that are names or ends of paths: looked up, since an automatic choice may name thousands."""
        return frozenset(pattern for pattern in self.patterns if LITERAL.fullmatch(pattern))

    def keeps(self, path: str) -> bool:
        """Whether the matrix at `path` stays in 16 bits; a pattern for a stack of experts matches each of them."""
        stack, _, number = path.rpartition(".")
        paths = (path, stack) if number.isdecimal() else (path,)
        if any(not self._names.isdisjoint(_ends_of(name)) for name in paths):
            return True
        expressions = (pattern for pattern in self.patterns if pattern not in self._names)
        return any(matches(pattern, name) for pattern in expressions for name in paths)

    def quantize(self, weight: "Tensor", bias: "Tensor | None" = None) -> "FrozenLinear":
        """As `others`: of a matrix that is not kept."""
        return self.others.quantize(weight, bias)

    @staticmethod
    def restore(description: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> "FrozenLinear":
        """As the kind in the description."""
        layer: FrozenLinear = QUANTIZERS[description["kind"]].restore(description, tensors)
        return layer

    def stored_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """As `others`."""
        return self.others.stored_bytes(out_features, in_features, dtype_bytes)

    def scratch_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """As `others`."""
        return self.others.scratch_bytes(out_features, in_features, dtype_bytes)

    def added_bytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """What one kept matrix takes more than a quantized one."""
        size = out_features, in_features, dtype_bytes
        return self.dense.stored_bytes(*size) - self.others.stored_bytes(*size)

    def budget_bytes(self, packed_bytes: int) -> int:
        """What a choice that is not made yet may add to a packed base of so many bytes."""
        return 0 if self.budget is None else share_bytes(self.budget, packed_bytes)

    def refuse_unused(self, paths: Iterable[str]) -> None:
        """RecipeError, with the nearest name, for a pattern that matches none of the matrices at `paths`."""
        known = list(paths)
        ends = {end for path in known for end in (*_ends_of(path), *_ends_of(STACK_INDEX.sub("", path)))}
        for pattern in self.patterns:
            alone = Keeping(self.others, self.dense, (pattern,))
            if pattern not in ends and not any(alone.keeps(path) for path in known):
                leaves = {STACK_INDEX.sub("", path).rpartition(".")[2] for path in known}
                raise RecipeError(f"quant.keep: {pattern!r} matches no matrix.{did_you_mean(pattern, leaves)}")


def _ends_of(path: str) -> Iterator[str]:
    """The path, and every end of it after a dot."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def quantizer_at(quantizer: Quantizer, path: str) -> Quantizer:
    """What stores the matrix at `path`: of a quantizer that keeps some matrices, one of its two."""
    if not isinstance(quantizer, Keeping):
        return quantizer
    return quantizer.dense if quantizer.keeps(path) else quantizer.others


def others_of(quantizer: Quantizer) -> Quantizer:
    """What stores the matrices that are not kept: the quantizer itself if it keeps none."""
    return quantizer.others if isinstance(quantizer, Keeping) else quantizer


def build_quantizer(section: Quant) -> Quantizer:
    """The quantizer of a recipe's section."""
    unused = section.without_effect()
    settings = {key: getattr(section, key) for key in ("double", "block") if key not in unused}
    quantizer: Quantizer = QUANTIZERS[section.kind](**settings)
    if section.kind == "dense" or not section.keep:
        return quantizer
    named, budget = (section.keep, None) if section.keep != "auto" else ((), section.keep_bytes)
    return Keeping(quantizer, QUANTIZERS["dense"](), tuple(named), budget)
