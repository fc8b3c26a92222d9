"""Runs that are stopped, damaged and compared: helpers for the tests of resuming."""

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
from qlora.runs import train as train_module
from qlora.training import loop
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records

Zoo = Callable[..., Path]
RECORDS, STEPS = 10, 6  # global batch 4: three steps an epoch, the last one short; two epochs

# Every optimizer, with and without dropout, packing, LoRA+, evaluation. Rank 64 makes tensors that 8 bits can hold.
COMBINATIONS = {
    "adamw": ("adapter.dropout=0.2", "adapter.kind=dora"),
    "offloaded_adamw": ("adapter.dropout=0.1",),
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


class ReferenceRun:
    """An uninterrupted run with a checkpoint after every step, in `output`, and copies of it as it was at a step."""

    def __init__(self, model: Path, folder: Path, optimizer: str) -> None:
        self.model, self.optimizer, self.output = model, optimizer, folder / "uninterrupted"
        self.data = write_records(folder / "records.jsonl", RECORDS)
        run(self.recipe(self.output))

    def recipe(self, output: Path, *overrides: str) -> Recipe:
        options = (f"optim.kind={self.optimizer}", "train.save_every=1", "train.keep=99", f"train.max_steps={STEPS}")
        return recipe_of(self.model, self.data, output, *options, *COMBINATIONS[self.optimizer], *overrides)

    def copy_until(self, step: int, output: Path) -> Path:
        """The run folder of a run that was killed after `step`."""
        for folder in self.output.glob("checkpoint-*"):
            if int(folder.name[-6:]) <= step:
                shutil.copytree(folder, output / folder.name)
        shutil.copy(self.output / "metrics.jsonl", output)
        return output


def assert_same_run(expected: Path, actual: Path) -> None:
    assert differing_tensors(expected, actual) == []
    for event in ("train", "eval"):
        assert metrics(expected, event) == metrics(actual, event)
    results = [json.loads((folder / "run.json").read_text())["result"] for folder in (expected, actual)]
    assert results[0] == results[1]


class signal_in_step:
    """Inside the block the process sends itself a signal in the middle of a step (counted from 1)."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number, self.patch = step, number, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        original = loop._step

        def step(job: Any, number: int) -> Any:
            if number + 1 == self.step:
                os.kill(os.getpid(), self.number)
            return original(job, number)

        self.patch.setattr(loop, "_step", step)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


class non_finite_gradient:
    """Inside the block the gradient of one tensor is not finite in some steps (counted from 1)."""

    def __init__(self, steps: Sequence[int], value: float = float("nan")) -> None:
        self.steps, self.value, self.patch, self.calls = steps, value, pytest.MonkeyPatch(), 0

    def __enter__(self) -> None:
        build_job = train_module.build_job

        def build_patched_job(*arguments: Any) -> Any:
            job = build_job(*arguments)
            list(job.trainable.values())[3].register_hook(self.replace)
            return job

        self.patch.setattr(train_module, "build_job", build_patched_job)

    def replace(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # one micro-batch a step
        return gradient * self.value if self.calls in self.steps else gradient

    def __exit__(self, *error: object) -> None:
        self.patch.undo()
