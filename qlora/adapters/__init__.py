"""The small trainable layers beside the frozen ones.

An adapter wraps a FrozenLinear and adds to its output. It relies only on the FrozenLinear's forward(x) and
weight(dtype), starts at the base's own output, and can be merged: the sum is again one matrix [O, I].
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from qlora.config import Between, KindOf, Rule, Section, setting
from qlora.utils.registry import Registry

ADAPTERS = Registry(
    "adapter.kind",
    lora="qlora.adapters.lora:Lora",  # W + (alpha / rank) B A                              arXiv:2106.09685
    rslora="qlora.adapters.rslora:RsLora",  # W + (alpha / sqrt rank) B A                   arXiv:2312.03732
    dora="qlora.adapters.dora:Dora",  # m (W + s B A) / |W + s B A| row by row              arXiv:2402.09353
    full="qlora.adapters.full:Full",  # W itself trains
)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{text[:60]!r} is no regular expression ({error}). Allowed: all-linear, a list of names."
        ) from None
    return text


Key = Annotated[str, Rule(_pattern)]
Ranks = dict[Key, Annotated[int, Between(ge=1)]]
Alphas = dict[Key, Annotated[float, Between(gt=0)]]


class Adapter(Section):
    """The small trainable layers."""

    kind: Annotated[str, KindOf(ADAPTERS)] = setting(
        "lora", "lora | rslora | dora | full (every weight trains; dense only)"
    )
    rank: int = setting(16, "columns of B; trainable bytes grow with it", ge=1, unsaid=True)
    alpha: float = setting(32.0, "strength: the update is scaled by alpha / rank", gt=0, unsaid=True)
    dropout: float = setting(0.0, "on the adapter's input, in training only", ge=0, lt=1, unsaid=True)
    targets: Annotated[str, Rule(_pattern)] | tuple[str, ...] = setting(
        "all-linear",
        "all-linear (of the decoder), a list of names, or one regular expression",
        min_length=1,
        unsaid=True,
    )
    save_modules: tuple[str, ...] = setting(
        (), "modules that train whole beside the updates: embed_tokens, lm_head, norm, ...", unsaid=True
    )
    tokens: tuple[str | int, ...] = setting(
        (), "tokens whose rows of embedding and head train, as texts or ids; all others stay frozen", unsaid=True
    )
    new_tokens: tuple[Annotated[str, Between(min_length=1)], ...] = setting(
        (), "texts that become tokens, with rows that train", unsaid=True
    )
    rank_pattern: Ranks | None = setting(
        None, "other ranks for some modules: {name or expression: rank}; null: none", unsaid=True
    )
    alpha_pattern: Alphas | None = setting(
        None, "other alphas for some modules: {name or expression: alpha}; null: none", unsaid=True
    )
    init: Literal["default", "gaussian", "pissa", "loftq"] = setting("default", "how A and B start", unsaid=True)

    def of_the_base(self) -> str | None:
        """The first setting by which parts of the base itself train; None if only updates beside it do."""
        if self.kind == "full":
            return "adapter.kind: full"
        named = {"save_modules": self.save_modules, "tokens": self.tokens, "new_tokens": self.new_tokens}
        return next((f"adapter.{key}" for key, said in named.items() if said), None)

    def idle(self) -> Mapping[str, str]:
        """Full fine-tuning adds no matrices."""
        keys = [key for key in type(self).model_fields if key != "kind"]
        return dict.fromkeys(keys, "adapter.kind full trains the weights themselves") if self.kind == "full" else {}
