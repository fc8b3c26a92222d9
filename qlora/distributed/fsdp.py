"""FSDP2: every process holds a share of the packed base."""

from torch import nn

from qlora.distributed.processes import Processes
from qlora.errors import NotBuiltYet


class Fsdp(Processes):
    """PyTorch's fully_shard under Accelerate."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Not there yet: NotBuiltYet."""
        raise NotBuiltYet(
            "distributed.kind: fsdp is not built yet. Use ddp (every card holds the model), or one process."
        )
