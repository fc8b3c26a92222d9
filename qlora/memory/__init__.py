"""Memory of a run: activation checkpointing, offload and streaming; planner/ predicts it from shapes alone."""

import re
from typing import Annotated, Literal

from qlora.config import Between, Section, setting
from qlora.errors import InputError

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = rf"^(0*[1-9]\d{{0,9}}(\.\d{{1,9}})?|0?\.\d*[1-9]\d{{0,9}}) ?({'|'.join(UNITS)})$"

Size = Annotated[str, Between(pattern=SIZE, max_length=30, examples=["24GiB", "24GB", "512MiB"])]
Layers = Annotated[int, Between(ge=0)]


def size_bytes(text: str) -> int:
    """The bytes of `24GiB` (2**30), `24GB` (10**9), `512MiB` ... InputError for any other text."""
    if not re.match(SIZE, text) or len(text) > 30:
        raise InputError(f"size: found {text[:60]!r}, allowed: a number with {', '.join(UNITS)}, such as 24GiB.")
    number, unit = re.split(r" ?(?=[KMGT])", text, maxsplit=1)
    return int(float(number) * UNITS[unit])


class Memory(Section):
    """The memory budget, and what saves memory; auto leaves it to the plan."""

    budget: Literal["auto"] | Size = setting(
        "auto", "auto: the GPU's own memory; or a size such as 24GiB: plan and run as if the GPU had that much"
    )
    recompute: Literal["auto", "all", "none"] | Layers = setting(
        "auto", "layers that recompute their activations in backward: auto | all | none | a number"
    )
    offload_activations: Literal["auto"] | bool = setting(
        "auto", "offload saved activations to host memory: auto | true | false"
    )
    weights: Literal["auto", "resident", "stream"] = setting(
        "auto", "auto | resident | stream (frozen layers stay in pinned host memory and are copied when used)"
    )

    def budget_bytes(self) -> int | None:
        """The budget in bytes; None for auto."""
        return None if self.budget == "auto" else size_bytes(self.budget)
