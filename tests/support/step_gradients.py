"""The gradients of one optimizer step of a tiny model, as one vector."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.types import IGNORED, Example
from qlora.runs.resources import unplanned
from qlora.runs.setup import build_job, set_up
from qlora.training.checkpoint import Position
from qlora.training.job import Job
from qlora.training.loop import fit
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal
from support.small_runs import recipe_of, write_records

SEQUENCES = 16


class Recorder(torch.optim.Optimizer):
    """An optimizer that changes nothing and keeps the gradients of its last step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__([{"params": list(parameters), "peak": 1.0}], {"lr": 1.0})
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        self.gradients = [p.grad.detach().clone() for p in self.param_groups[0]["params"] if p.grad is not None]


def job_of(model: Path, folder: Path, *overrides: str, records: int = 8, data: Path | None = None) -> Job:
    """A job on a tiny model with random adapters, without gradient clipping; data: None writes `records` records."""
    data = data or write_records(folder / "records.jsonl", records, max_words=9)
    options = ("optim.max_grad_norm=null", "train.max_steps=1", f"train.global_batch={records}", *overrides)
    recipe = recipe_of(model, data, folder / "run", *options)
    log = Log(folder / "run", quiet=True)
    log.truncate(0)
    job = build_job(set_up(recipe, unplanned(recipe), log), log, StopSignal())
    with torch.no_grad():
        for number, value in enumerate(job.trainable.values()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
    return replace(job, optimizer=Recorder(list(job.trainable.values())))


def gradients(job: Job, **changes: Any) -> Tensor:
    """All gradients of the first step as one vector. `changes`: other train settings, and `train`: other examples."""
    examples = changes.pop("train", job.train_examples)
    settings = job.settings.model_copy(update=changes)
    sizes = [settings.micro_batch] * job.processes.world_size
    changed = replace(job, settings=settings, train_examples=examples, micro_batch_sizes=sizes, total_steps=1)
    fit(changed, Position())
    tensors = changed.optimizer.gradients  # type: ignore[attr-defined]
    assert len(tensors) == len(job.trainable)
    return torch.cat([gradient.flatten() for gradient in tensors])


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((actual - expected).norm() / expected.norm())


def random_examples(seed: int) -> list[Example]:
    """Examples of 2 to 39 tokens; in some nearly no token is trained, in some all."""
    draw = np.random.default_rng(seed)
    examples = []
    for number in range(SEQUENCES):
        length = int(draw.integers(2, 40))
        ids = draw.integers(5, 250, length).astype(np.int32)
        trained_from = int(draw.integers(0, length))
        examples.append(Example(f"{number}", ids, np.where(np.arange(length) < trained_from, IGNORED, ids)))
    return examples
