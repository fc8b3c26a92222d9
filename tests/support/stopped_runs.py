"""Whole runs that are stopped, spoilt and compared: what the tests of resuming share."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.recipe.recipe import Recipe
from qlora.runs import train as walk
from qlora.training import loop
from support.small_runs import differing, metrics, recipe_of, run, write_rows

Zoo = Callable[..., Path]
ROWS, STEPS = 10, 6  # global batch 4: three steps an epoch, the last one short; two epochs

# Every optimiser, with and without dropout, packing, LoRA+, held-out rows. Rank 64 makes tensors that 8 bits can hold.
COMBINATIONS = {
    "adamw": ("adapter.dropout=0.2", "adapter.kind=dora"),
    "hosted_adamw": ("adapter.dropout=0.1",),
    "adamw_8bit": ("adapter.rank=64", "data.packing=true", "adapter.dropout=0.1"),
    "paged_adamw_32bit": (
        "data.packing=true",
        "optim.loraplus_ratio=4",
        "optim.schedule=cosine",
        "optim.warmup=2",
        "adapter.init=pissa",
    ),
    "paged_adamw_8bit": ("adapter.rank=64", "adapter.kind=rslora", "data.eval_fraction=0.2", "train.eval_every=2"),
}


class Session:
    """An uninterrupted run with a checkpoint after every step, and copies of it as they were at a step."""

    def __init__(self, model: Path, folder: Path, kind: str) -> None:
        self.model, self.folder, self.kind = model, folder, kind
        self.data = write_rows(folder / "rows.jsonl", ROWS)
        run(self.recipe(folder / "whole"))

    def recipe(self, output: Path, *overrides: str) -> Recipe:
        options = (f"optim.kind={self.kind}", "train.save_every=1", "train.keep=99", f"train.max_steps={STEPS}")
        return recipe_of(self.model, self.data, output, *options, *COMBINATIONS[self.kind], *overrides)

    def stopped_at(self, step: int, output: Path) -> Path:
        """What a run that died after `step` has left."""
        for folder in (self.folder / "whole").glob("checkpoint-*"):
            if int(folder.name[-6:]) <= step:
                shutil.copytree(folder, output / folder.name)
        shutil.copy(self.folder / "whole" / "metrics.jsonl", output)
        return output


def same_run(whole: Path, other: Path) -> None:
    assert differing(whole, other) == []
    for event in ("train", "eval"):
        assert metrics(whole, event) == metrics(other, event)
    results = [json.loads((folder / "run.json").read_text())["result"] for folder in (whole, other)]
    assert results[0] == results[1]


class stop_after:
    """Inside the block the process sends itself a signal in the middle of a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number, self.patch = step, number, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        taken = loop._step

        def step(job: Any, number: int) -> Any:
            if number + 1 == self.step:
                os.kill(os.getpid(), self.number)
            return taken(job, number)

        self.patch.setattr(loop, "_step", step)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


class poisoned:
    """Inside the block one adapter's gradient is not finite in the steps named (counted from 1)."""

    def __init__(self, steps: Sequence[int], value: float = float("nan")) -> None:
        self.steps, self.value, self.patch, self.calls = steps, value, pytest.MonkeyPatch(), 0

    def __enter__(self) -> None:
        assemble = walk.assemble

        def assembled(*arguments: Any) -> Any:
            job = assemble(*arguments)
            list(job.trainable.values())[3].register_hook(self.spoil)
            return job

        self.patch.setattr(walk, "assemble", assembled)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # one micro-batch a step
        return gradient * self.value if self.calls in self.steps else gradient

    def __exit__(self, *error: object) -> None:
        self.patch.undo()
