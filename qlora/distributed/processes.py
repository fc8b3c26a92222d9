"""The processes of a run: who is who, what is summed over them, how they stop together.  Door: accelerate.

Accelerate launches, places, wraps and reduces; it does not checkpoint, shuffle or schedule here.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import TORCH_DISTRIBUTED_OPERATION_TYPES, DistributedDataParallelKwargs
from torch import Tensor, nn

from qlora.errors import QloraError
from qlora.utils.redact import redacted, redacted_values


class Processes:
    """All processes of a run, seen from one of them."""

    shards = False  # whether a process holds only its share of the frozen base

    def __init__(self, report_to: Sequence[str] = (), project_dir: Path | None = None) -> None:
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes without a card would each believe to be alone
            mixed_precision="no",
            log_with=list(report_to) or None,
            # The base is frozen and every process computes its buffers by itself: nothing to send before a forward.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
            project_dir=str(project_dir) if project_dir else None,
        )
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if self.world != self.launched():
            raise QloraError(
                f"the launcher started {self.launched()} processes, but only {self.world} found each other."
            )

    @staticmethod
    def launched() -> int:
        """How many processes the launcher started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def launched_for_shares() -> bool:
        """Whether `accelerate launch` was told to use FSDP, by its configuration or --use_fsdp."""
        return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"

    @property
    def together(self) -> bool:
        """Whether the base is read by several processes, or held in shares by them."""
        return self.world > 1 or self.shards

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return bool(self.accelerator.is_main_process)

    @property
    def writes(self) -> bool:
        """Whether this process writes to its machine's disk."""
        return self.is_main

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as this strategy trains it."""
        return module

    def shard(
        self, module: nn.Module, lasting: bool = False, whole: Sequence[nn.Parameter] = (), host: bool = False
    ) -> None:
        """Keep this process's share of a frozen module: all of it, unless the strategy shards."""

    def bring(self, module: nn.Module, part: nn.Module) -> None:
        """Have `part` of a sharded `module` whole outside of its forward and backward: it is, unless sharded."""

    def settle(self) -> None:
        """Return what was brought."""

    def bare(self, module: nn.Module) -> nn.Module:
        """The module without its wrapping: what evaluation calls, as often as each process has rows."""
        return self.accelerator.unwrap_model(module)  # type: ignore[no-any-return]

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients are exchanged on the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, summed over processes: the mean that data parallelism takes is undone."""
        self.accelerator.backward(loss * self.world)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """The gradient's norm before it was clipped to `max_norm` (None: only measured)."""
        limit = float("inf") if max_norm is None else max_norm
        return torch.as_tensor(self.accelerator.clip_grad_norm_(list(parameters), limit))

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.accelerator.distributed_type not in TORCH_DISTRIBUTED_OPERATION_TYPES:
            return value
        return self.accelerator.reduce(value, reduction="sum")  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """Whether any process raises the flag."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def agreed(self, flag: bool) -> bool:
        """Whether this process may go by the flag: alone, where a forward takes no other process."""
        return flag

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def start_trackers(self, name: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Open the trackers named at the start; `settings` are sections of keys."""
        flat = {f"{group}.{key}": str(value) for group, values in settings.items() for key, value in values.items()}
        self.accelerator.init_trackers(redacted(name), config=redacted_values(flat))

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send values of a step to the trackers; nothing happens without one."""
        self.accelerator.log(dict(values), step=step)

    def end(self) -> None:
        """Close trackers and the process group."""
        self.accelerator.end_training()
