"""FSDP2: every rank holds a shard of the frozen base model, packed bytes included; adapters are replicated.

Frozen parameters are sharded by `fully_shard`; trained parameters are replicated, and DDP sums their gradients once a
step. Adapters are a few thousandths of the base, so sharding them would save nothing and cost an all-gather per layer.

`fully_shard` is called here, not by Accelerate (1.15): its prepare_model needs the whole model in memory on every rank
first, shards adapters too, and does not shard integer parameters. MixedPrecisionPolicy is empty, so nothing is cast:
the gathered bytes are the stored bytes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from qlora.distributed.processes import Processes


class Fsdp(Processes):
    """PyTorch's fully_shard over the base model while it loads, DDP over the adapters."""

    shards = True

    def __init__(self, report_to: Sequence[str] = (), project_dir: Path | None = None) -> None:
        super().__init__(report_to, project_dir)
        if not dist.is_initialized():  # a device mesh needs a process group, also for a single process
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        self._mesh = init_device_mesh(self.device.type, (self.world_size,))
        self._unsharded: FSDPModule | None = None

    def shard(
        self,
        module: nn.Module,
        keep_unsharded: bool = False,
        ignored: Sequence[nn.Parameter] = (),
        offload: bool = False,
    ) -> None:
        """Keep this rank's shard of `module`; its forward and backward all-gather it.

        `keep_unsharded`: its forward does not reshard it, the caller does. `ignored`: parameters that are not sharded.
        `offload`: on a GPU, the shard is kept in pinned host memory.
        """
        on_host = offload and self.device.type != "cpu"
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=not keep_unsharded,
            mp_policy=MixedPrecisionPolicy(),
            offload_policy=CPUOffloadPolicy() if on_host else OffloadPolicy(),
            ignored_params=set(ignored),
        )

    def unshard(self, module: nn.Module, submodule: nn.Module) -> None:
        """All-gather a sharded `module` outside of its forward and backward, for a `submodule`, until the next call."""
        parameter = next(submodule.parameters(recurse=False), None)
        if isinstance(module, FSDPModule) and hasattr(parameter, "to_local"):
            self.reshard()
            module.unshard()
            self._unsharded = module

    def reshard(self) -> None:
        """Free what `unshard` gathered."""
        if self._unsharded is not None:
            self._unsharded.reshard()
        self._unsharded = None

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with a gradient all-reduce in backward; its base was sharded when it was loaded."""
        self.reshard()
        if self.world_size == 1:
            return module
        frozen = [name for name, value in module.named_parameters() if not value.requires_grad]
        buffers = [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen + buffers)
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module without DDP; its base stays sharded."""
        return module.module if isinstance(module, DistributedDataParallel) else module

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients are reduced on the last one only."""
        skip = isinstance(module, DistributedDataParallel) and not last
        return module.no_sync() if skip else nullcontext()  # type: ignore[union-attr, operator]

    def any_if_sharded(self, flag: bool) -> bool:
        """Whether any rank raises the flag: every rank takes part in a forward, so that none may stop alone."""
        return self.any(flag)
