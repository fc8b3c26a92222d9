"""Memory of a run: activation checkpointing, offload and streaming; planner/ predicts it from shapes alone."""

from typing import Annotated, Literal

from qlora.config import Between, Section, setting
from qlora.utils.byte_sizes import SIZE, size_bytes

Size = Annotated[str, Between(pattern=SIZE, max_length=30, examples=["24GiB", "24GB", "512MiB"])]
Layers = Annotated[int, Between(ge=0)]


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
