"""What lives where, and when: planned from shapes alone, chosen to fit a budget, and measured beside the plan."""

import re
from typing import Annotated, Literal

from qlora.config import Between, Section, setting
from qlora.errors import InputError

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = rf"^(0*[1-9]\d{{0,9}}(\.\d{{1,9}})?|0?\.\d*[1-9]\d{{0,9}}) ?({'|'.join(UNITS)})$"

Size = Annotated[str, Between(pattern=SIZE, max_length=30, examples=["24GiB", "24GB", "512MiB"])]
Layers = Annotated[int, Between(ge=0)]


def size_bytes(text: str) -> int:
    """The bytes of `24GiB` (2**30), `24GB` (10**9), `512MiB` ... InputError if it is no such size."""
    if not re.match(SIZE, text) or len(text) > 30:
        raise InputError(f"{text[:60]!r} is no size. Allowed: a number and {', '.join(UNITS)}, such as 24GiB.")
    number, unit = re.split(r" ?(?=[KMGT])", text, maxsplit=1)
    return int(float(number) * UNITS[unit])


class Memory(Section):
    """What may be used, and how it is saved; auto leaves it to the plan."""

    budget: Literal["auto"] | Size = setting(
        "auto", "auto: the card's own; or 24GiB: plan and run as if it had so much"
    )
    recompute: Literal["auto", "all", "none"] | Layers = setting(
        "auto", "layers that recompute their activations in backward: auto | all | none | a number"
    )
    offload_activations: Literal["auto"] | bool = setting(
        "auto", "park kept activations in host memory: auto | true | false"
    )
    weights: Literal["auto", "resident", "stream"] = setting(
        "auto", "auto | resident | stream (frozen layers come from pinned host memory)"
    )

    def budget_bytes(self) -> int | None:
        """The budget in bytes; None for auto."""
        return None if self.budget == "auto" else size_bytes(self.budget)
