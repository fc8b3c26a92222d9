"""Who holds which part, on Accelerate's engines: every strategy gives the loss curve of one process."""

from typing import Annotated

from qlora.config import KindOf, Section, setting
from qlora.utils.registry import Registry

STRATEGIES = Registry(
    "distributed.kind",
    single="qlora.distributed.single:Single",  # one process
    ddp="qlora.distributed.ddp:Ddp",  # every process holds the whole model
    fsdp="qlora.distributed.fsdp:Fsdp",  # FSDP2: every process holds a share, base included
)


class Distributed(Section):
    """How the processes share the work."""

    kind: Annotated[str, KindOf(STRATEGIES, "auto")] = setting(
        "auto", "auto (by the launcher's process count and the plan) | single | ddp | fsdp"
    )
