"""The gradients of one optimizer step of a tiny model, as one vector."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.types import IGNORED, Example
from qlora.runs.strategy import open_processes
from qlora.runs.train import assemble, gather
from qlora.training.checkpoint import Position
from qlora.training.loop import Job, fit
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal
from support.small_runs import recipe_of, write_rows

ROWS = 16


class Recorder(torch.optim.Optimizer):
    """An optimiser that moves nothing and keeps the gradients of its last step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__([{"params": list(parameters), "peak": 1.0}], {"lr": 1.0})
        self.seen: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        self.seen = [p.grad.detach().clone() for p in self.param_groups[0]["params"] if p.grad is not None]


def job_of(model: Path, folder: Path, *overrides: str, rows: int = 8) -> Job:
    """A job on a tiny model whose adapters are away from their start, gradients unclipped."""
    data = write_rows(folder / "rows.jsonl", rows, longest=9)
    options = ("optim.max_grad_norm=null", "train.max_steps=1", f"train.global_batch={rows}", *overrides)
    recipe = recipe_of(model, data, folder / "run", *options)
    log = Log(folder / "run", quiet=True)
    log.restart(0)
    job = assemble(gather(recipe, open_processes(recipe), None, log), log, StopSignal())
    with torch.no_grad():
        for number, value in enumerate(job.trainable.values()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
    return replace(job, optimizer=Recorder(list(job.trainable.values())))


def gradients(job: Job, **changes: Any) -> Tensor:
    """All gradients of the first step as one vector, the settings of the run changed as told."""
    train = changes.pop("train", job.train)
    changed = replace(job, settings=job.settings.model_copy(update=changes), train=train, steps=1)
    fit(changed, Position())
    seen = changed.optimizer.seen  # type: ignore[attr-defined]
    assert len(seen) == len(job.trainable)
    return torch.cat([each.flatten() for each in seen])


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def rows_of(seed: int) -> list[Example]:
    """Rows of 1 to 40 tokens; some with next to nothing trained, some wholly."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(ROWS):
        length = int(draw.integers(2, 40))
        ids = draw.integers(5, 250, length).astype(np.int32)
        trained_from = int(draw.integers(0, length))
        made.append(Example(f"{number}", ids, np.where(np.arange(length) < trained_from, IGNORED, ids)))
    return made
