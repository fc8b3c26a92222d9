"""FSDP2: every process holds a share of the frozen base, packed bytes included; adapters are held whole by each.

The rule: what is frozen is sharded by `fully_shard`, what trains is replicated and its gradients are summed by DDP,
once a step. Adapters are a few thousandths of the base, so their shards would save nothing and cost a gather a layer.

`fully_shard` is called here, not by Accelerate (1.15), whose prepare_model wants the whole model in memory on every
process first, shards adapters as well, and leaves integer parameters whole. No policy casts anything: MixedPrecision is
empty, so every byte that is gathered is the byte that was stored.
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
    """PyTorch's fully_shard over the base as it loads, DDP over the adapters."""

    shards = True

    def __init__(self, report_to: Sequence[str] = (), project_dir: Path | None = None) -> None:
        super().__init__(report_to, project_dir)
        if not dist.is_initialized():  # one process: a mesh needs a group all the same
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        self._mesh = init_device_mesh(self.device.type, (self.world,))
        self._brought: FSDPModule | None = None

    def shard(
        self, module: nn.Module, lasting: bool = False, whole: Sequence[nn.Parameter] = (), host: bool = False
    ) -> None:
        """Keep this process's share of `module` and give the rest back; forward and backward gather it for themselves.

        `lasting`: whoever gathers it returns it. `whole`: parameters that stay as they are. `host`: the share waits in
        pinned main memory, where the device is not that.
        """
        away = host and self.device.type != "cpu"
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=not lasting,
            mp_policy=MixedPrecisionPolicy(),
            offload_policy=CPUOffloadPolicy() if away else OffloadPolicy(),
            ignored_params=set(whole),
        )

    def bring(self, module: nn.Module, part: nn.Module) -> None:
        """Have `part` of a sharded `module` whole outside of its forward and backward, until another one is brought."""
        sharded = next(part.parameters(recurse=False), None)
        if isinstance(module, FSDPModule) and hasattr(sharded, "to_local"):
            self.settle()
            module.unshard()
            self._brought = module

    def settle(self) -> None:
        """Return what was brought."""
        if self._brought is not None:
            self._brought.reshard()
        self._brought = None

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with the gradients of what trains summed in backward; its base was sharded when it was loaded."""
        self.settle()
        if self.world == 1:
            return module
        frozen = [name for name, value in module.named_parameters() if not value.requires_grad]
        buffers = [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen + buffers)
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def bare(self, module: nn.Module) -> nn.Module:
        """The module without DDP; its base stays sharded."""
        return module.module if isinstance(module, DistributedDataParallel) else module

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients are exchanged on the last one only."""
        joined = isinstance(module, DistributedDataParallel) and not last
        return module.no_sync() if joined else nullcontext()  # type: ignore[union-attr, operator]

    def agreed(self, flag: bool) -> bool:
        """Whether any process raises the flag: a forward takes all processes, so that none may stop alone."""
        return self.any(flag)
