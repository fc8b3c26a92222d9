"""Training strategies on Accelerate's engines; every one gives the loss curve of a single process."""

from typing import Annotated

from qlora.config import KindOf, Section, setting
from qlora.utils.registry import Registry

STRATEGIES = Registry(
    "distributed.kind",
    single="qlora.distributed.single:Single",  # one process
    ddp="qlora.distributed.ddp:Ddp",  # every rank holds the whole model
    fsdp="qlora.distributed.fsdp:Fsdp",  # FSDP2: every rank holds a shard of the frozen base model
)


class Distributed(Section):
    """How the model is distributed over the processes."""

    kind: Annotated[str, KindOf(STRATEGIES, "auto")] = setting(
        "auto", "auto (by the launcher's process count and the plan) | single | ddp | fsdp"
    )
