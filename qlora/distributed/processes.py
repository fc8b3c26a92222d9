"""The processes of a run: rank and world size, wrapping of the model, reductions, trackers.

Accelerate launches, places, wraps and reduces; checkpoints, shuffling and schedules are not left to it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import TORCH_DISTRIBUTED_OPERATION_TYPES, DistributedDataParallelKwargs
from torch import Tensor, distributed, nn

from qlora.distributed.trackers import end_trackers, start_trackers
from qlora.errors import InputError, QloraError
from qlora.utils.devices import device_type

_ended_groups: list[Any] = []  # kept until the process exits


class Processes:
    """All processes of a run, seen from one of them."""

    shards = False  # whether a rank holds only a shard of the frozen base model

    def __init__(self, report_to: Sequence[str] = (), project_dir: Path | None = None) -> None:
        self.accelerator = Accelerator(
            cpu=device_type() == "cpu",  # else each of several processes without a GPU would have world size 1
            mixed_precision="no",
            log_with=list(report_to) or None,
            # The base is frozen and every rank computes its own buffers: no broadcast before a forward.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
            project_dir=str(project_dir) if project_dir else None,
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if self.world_size != self.launched_world_size():
            raise QloraError(
                f"the launcher started {self.launched_world_size()} processes, but only {self.world_size} joined the "
                "process group. Check the launcher's configuration."
            )

    @staticmethod
    def launched_world_size() -> int:
        """The number of processes that the launcher started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def launched_with_fsdp() -> bool:
        """Whether `accelerate launch` was set to use FSDP, by its configuration or --use_fsdp."""
        return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"

    @property
    def loads_together(self) -> bool:
        """Whether several ranks read the base model together, or it is sharded while it loads."""
        return self.world_size > 1 or self.shards

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return bool(self.accelerator.is_main_process)

    @property
    def writes(self) -> bool:
        """Whether this rank writes to disk."""
        return self.is_main

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as this strategy trains it."""
        return module

    def shard(
        self,
        module: nn.Module,
        keep_unsharded: bool = False,
        ignored: Sequence[nn.Parameter] = (),
        offload: bool = False,
    ) -> None:
        """Keep this rank's shard of a frozen module; nothing to do unless the strategy shards."""

    def unshard(self, module: nn.Module, submodule: nn.Module) -> None:
        """All-gather a sharded `module` outside of its forward and backward; nothing to do unless it is sharded."""

    def reshard(self) -> None:
        """Free what `unshard` gathered."""

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module without its wrapper: evaluation calls it, as many times as the rank has batches."""
        return self.accelerator.unwrap_model(module)  # type: ignore[no-any-return]

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients are reduced on the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, summed over ranks: multiplied by the world size, since data parallelism averages."""
        self.accelerator.backward(loss * self.world_size)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """The gradient norm before clipping to `max_norm` (None: no clipping)."""
        limit = float("inf") if max_norm is None else max_norm
        return torch.as_tensor(self.accelerator.clip_grad_norm_(list(parameters), limit))

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.accelerator.distributed_type not in TORCH_DISTRIBUTED_OPERATION_TYPES:
            return value
        return self.accelerator.reduce(value, reduction="sum")  # type: ignore[no-any-return]

    def sum_counts(self, counts: Tensor) -> Tensor:
        """The sum of a tensor in host memory over all ranks; a single process does not ask its GPU."""
        return counts if self.world_size == 1 else self.sum(counts.to(self.device)).cpu()

    def any(self, flag: bool) -> bool:
        """Whether any rank raises the flag."""
        return bool(self.sum_counts(torch.tensor(int(flag))).item())

    def any_if_sharded(self, flag: bool) -> bool:
        """The flag of this rank; of any rank, where a forward needs all of them."""
        return flag

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.accelerator.wait_for_everyone()

    def start_trackers(self, folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Open the trackers of `report_to` for the run in `folder`; returns how to look at those of this machine.

        `settings` maps section -> key -> value.
        """
        return start_trackers(self.accelerator, folder, settings)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of a step to the trackers, if there are any."""
        self.accelerator.log(dict(values), step=step)

    def end(self) -> None:
        """Close trackers and the process group."""
        if distributed.is_initialized():
            # Freed with the DDP wrapper, it joins gloo's threads under Python's lock, which one of them may wait for.
            _ended_groups.append(distributed.group.WORLD)
        end_trackers(self.accelerator)


def require_one_process(command: str) -> None:
    """InputError for `qlora COMMAND`, which runs in one process, under a launcher of several."""
    world_size = Processes.launched_world_size()
    if world_size > 1:
        raise InputError(
            f"qlora {command} runs in one process, but the launcher started {world_size}. Start it without a launcher; "
            f"on another GPU: CUDA_VISIBLE_DEVICES=1 qlora {command} ..."
        )
