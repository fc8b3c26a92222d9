"""Largest difference between a run resumed from a checkpoint and the uninterrupted run: it must be 0."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora.adapters import peft_files
from qlora.recipe.recipe import Recipe
from qlora.runs.train import train
from qlora.training import OPTIMIZERS
from qlora.training.checkpoint import OPTIMIZER
from support.child_processes import Child, Notify
from support.rank_processes import pair
from support.small_runs import adapter_tensors, metrics, recipe_of, write_records

STEPS = 6


@dataclass(frozen=True)
class Case:
    """A combination of settings."""

    optimizer: str
    packing: bool
    dropout: float
    world: int

    def recipe(self, model: Path, data: Path, output: Path) -> Recipe:
        options = (
            f"optim.kind={self.optimizer}", f"data.packing={str(self.packing).lower()}", "data.max_length=64",
            f"adapter.dropout={self.dropout}", f"train.max_steps={STEPS}", "train.save_every=1", "train.keep=99",
            "train.micro_batch=2", "adapter.rank=64", "data.eval_fraction=0.2", "train.eval_every=2",
            "data.train_on=all",
        )  # fmt: skip
        return recipe_of(model, data, output, *options)


@dataclass
class Result:
    """Counts of resumed runs, and their differences from uninterrupted ones."""

    cases: int = 0
    resumes: int = 0
    max_difference: float = 0.0  # over all weights and the optimizer state
    other_lines: int = 0  # runs whose metrics differ
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.max_difference or self.other_lines or self.failed)


def cases() -> Iterator[Case]:
    for optimizer, packing, dropout, world in itertools.product(OPTIMIZERS, (False, True), (0.0, 0.2), (1, 2)):
        yield Case(optimizer, packing, dropout, world)


def resume_all(
    model: Path, home: Path, selection: list[Case], steps: tuple[int, ...], report: Callable[[Result], None]
) -> Result:
    """Run each case without interruption, then from its checkpoint after each of `steps`."""
    result, data = Result(), write_records(home / "rows.jsonl", 12)
    uninterrupted, resumed = home / "uninterrupted-run", home / "resumed-run"
    for case in selection:
        shutil.rmtree(uninterrupted, ignore_errors=True)
        _run(case, case.recipe(model, data, uninterrupted), home, result)
        result.cases += 1
        for step in steps:
            shutil.rmtree(resumed, ignore_errors=True)
            resumed.mkdir()
            shutil.copy(uninterrupted / "metrics.jsonl", resumed)
            shutil.copytree(uninterrupted / f"checkpoint-{step:06d}", resumed / f"checkpoint-{step:06d}")
            _run(case, case.recipe(model, data, resumed), home, result)
            result.resumes += 1
            difference = _difference(uninterrupted, resumed)
            result.max_difference = max(result.max_difference, difference)
            events = ("train", "eval")
            result.other_lines += any(metrics(uninterrupted, event) != metrics(resumed, event) for event in events)
            if difference:
                result.notes.append(f"{case} from step {step}: {difference}")
            report(result)
    for folder in (uninterrupted, resumed):
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _run(case: Case, recipe: Recipe, home: Path, result: Result) -> None:
    def work(rank: int, notify: Notify) -> None:
        train(recipe, quiet=True)

    children = pair(work, home) if case.world == 2 else [Child(lambda notify: work(0, notify), home / "log-0")]
    if any(child.wait() for child in children):
        result.failed += 1
        result.notes.append(f"{case}: {(home / 'log-0').read_text()[-500:]}")
    (home / "log-0").unlink(missing_ok=True)


def _difference(one: Path, other: Path) -> float:
    """The largest difference between the adapters and between the last checkpoints' optimizer states."""
    last = f"checkpoint-{STEPS:06d}/{OPTIMIZER}"
    pairs = (
        (adapter_tensors(one), adapter_tensors(other)),
        (peft_files.read_tensors(one / last), peft_files.read_tensors(other / last)),
    )
    largest = 0.0
    for a, b in pairs:
        assert a.keys() == b.keys()
        largest = max(largest, *(float((a[name].double() - b[name].double()).abs().max()) for name in a))
        assert largest or all(torch.equal(a[name], b[name]) for name in a)
    return largest
