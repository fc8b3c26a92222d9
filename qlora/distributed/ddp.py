"""DDP: every rank holds the whole model and trains on its part of each batch; gradients of the adapters are summed."""

from torch import nn

from qlora.distributed.processes import Processes


class Ddp(Processes):
    """PyTorch's DistributedDataParallel under Accelerate."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with a gradient all-reduce in backward."""
        return self.accelerator.prepare_model(module)  # type: ignore[no-any-return]
