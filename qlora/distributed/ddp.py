"""DDP: every process holds the whole model and its share of the rows; adapters' gradients are summed."""

from torch import nn

from qlora.distributed.processes import Processes


class Ddp(Processes):
    """PyTorch's DistributedDataParallel under Accelerate."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients exchanged in backward."""
        return self.accelerator.prepare_model(module)  # type: ignore[no-any-return]
