"""Adapters: trainable layers around frozen ones, and the recipe section that chooses them.

An adapter wraps a FrozenLinear and adds an update to its output. It uses only the FrozenLinear's forward(x) and
weight(dtype), starts at the base model's output, and can be merged: W + delta is one matrix [O, I] again.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from qlora.config import Between, KindOf, Section, Validator, setting
from qlora.utils.registry import Registry

ADAPTERS = Registry(
    "adapter.kind",
    lora="qlora.adapters.lora:Lora",  # W + (alpha / rank) B A                              arXiv:2106.09685
    rslora="qlora.adapters.rslora:RsLora",  # W + (alpha / sqrt rank) B A                   arXiv:2312.03732
    dora="qlora.adapters.dora:Dora",  # m (W + s B A) / |W + s B A| row by row              arXiv:2402.09353
    full="qlora.adapters.full:Full",  # W itself trains
)


def _check_expression(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{text[:60]!r} is not a regular expression ({error}). Allowed: all-linear, a list of names."
        ) from None
    return text


ModulePattern = Annotated[str, Validator(_check_expression)]
RankPattern = dict[ModulePattern, Annotated[int, Between(ge=1)]]
AlphaPattern = dict[ModulePattern, Annotated[float, Between(gt=0)]]


class Adapter(Section):
    """The trainable layers."""

    kind: Annotated[str, KindOf(ADAPTERS)] = setting(
        "lora", "lora | rslora | dora | full (every weight trains; dense only)"
    )
    rank: int = setting(16, "columns of B; trainable bytes grow with it", ge=1, nullable=True)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", gt=0, nullable=True)
    dropout: float = setting(0.0, "on the adapter's input, in training only", ge=0, lt=1, nullable=True)
    targets: ModulePattern | tuple[str, ...] = setting(
        "all-linear",
        "all-linear (of the decoder), a list of names, or one regular expression",
        min_length=1,
        nullable=True,
    )
    save_modules: tuple[str, ...] = setting(
        (), "modules to train in full, in addition to the updates: embed_tokens, lm_head, norm, ...", nullable=True
    )
    tokens: tuple[str | int, ...] = setting(
        (), "tokens whose rows of embedding and head train, as texts or ids; all others stay frozen", nullable=True
    )
    new_tokens: tuple[Annotated[str, Between(min_length=1)], ...] = setting(
        (), "texts to add as tokens, with trainable rows", nullable=True
    )
    rank_pattern: RankPattern | None = setting(
        None, "other ranks for some modules: {name or expression: rank}; null: none", nullable=True
    )
    alpha_pattern: AlphaPattern | None = setting(
        None, "other alphas for some modules: {name or expression: alpha}; null: none", nullable=True
    )
    init: Literal["default", "gaussian", "pissa", "loftq"] = setting(
        "default", "how A and B are initialized", nullable=True
    )
    expert_rank: Literal["auto"] | Annotated[int, Between(ge=0)] = setting(
        "auto",
        "rank of each expert's update: auto (rank / experts a token visits, at least 1) | a number | 0: experts frozen",
        nullable=True,
    )

    def trains_base_weights(self) -> str | None:
        """The first setting that trains weights of the base model itself; None if only low-rank updates train."""
        if self.kind == "full":
            return "adapter.kind: full"
        settings = {"save_modules": self.save_modules, "tokens": self.tokens, "new_tokens": self.new_tokens}
        return next((f"adapter.{key}" for key, values in settings.items() if values), None)

    def without_effect(self) -> Mapping[str, str]:
        """Full fine-tuning adds no matrices, so every other setting is without effect."""
        keys = [key for key in type(self).model_fields if key != "kind"]
        return dict.fromkeys(keys, "adapter.kind full trains the weights themselves") if self.kind == "full" else {}
