"""Runs that are stopped, damaged and compared: helpers for the tests of resuming."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora.recipe.recipe import Recipe
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records
from support.training_hooks import before_first_forward, before_update, trainable

Zoo = Callable[..., Path]
RECORDS, STEPS = 10, 6  # global batch 4: three steps an epoch, the last one short; two epochs

# Every optimizer, with and without dropout, packing, LoRA+, evaluation, several micro-batches.
# Rank 64 makes tensors that 8 bits can hold.
COMBINATIONS = {
    "adamw": ("adapter.dropout=0.2", "adapter.kind=dora", "train.micro_batch=2"),
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


@contextmanager
def signal_in_step(step: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Inside the block the process sends itself a signal in the middle of a step (counted from 1)."""

    def send(update: int) -> None:
        if update == step:
            os.kill(os.getpid(), number)

    with before_update(send):
        yield


@contextmanager
def non_finite_gradient(steps: Sequence[int], value: float = float("nan")) -> Iterator[None]:
    """Inside the block the gradient of one tensor is not finite in some steps (counted from 1)."""
    calls = 0

    def replace(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1  # one micro-batch a step
        return gradient * value if calls in steps else gradient

    with before_first_forward(lambda model: list(trainable(model).values())[3].register_hook(replace)):
        yield
