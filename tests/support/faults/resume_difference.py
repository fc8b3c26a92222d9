"""A run that went on from a checkpoint against the run that never stopped: the largest difference, which must be 0."""

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
from support.child_processes import Child, Tell
from support.rank_processes import pair
from support.small_runs import adapter_tensors, metrics, recipe_of, write_rows

STEPS = 6


@dataclass(frozen=True)
class Case:
    """One way to train."""

    optimizer: str
    packing: bool
    dropout: float
    world: int

    def recipe(self, model: Path, data: Path, output: Path) -> Recipe:
        options = (
            f"optim.kind={self.optimizer}", f"data.packing={str(self.packing).lower()}", "data.max_length=64",
            f"adapter.dropout={self.dropout}", f"train.max_steps={STEPS}", "train.save_every=1", "train.keep=99",
            "adapter.rank=64", "data.eval_fraction=0.2", "train.eval_every=2", "data.train_on=all",
        )  # fmt: skip
        return recipe_of(model, data, output, *options)


@dataclass
class Found:
    """How far resumed runs are from those that never stopped."""

    cases: int = 0
    resumes: int = 0
    max_difference: float = 0.0  # over all weights and all moments of the optimiser
    other_lines: int = 0  # runs whose lines of metrics differ
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.max_difference or self.other_lines or self.failed)


def cases() -> Iterator[Case]:
    for optimizer, packing, dropout, world in itertools.product(OPTIMIZERS, (False, True), (0.0, 0.2), (1, 2)):
        yield Case(optimizer, packing, dropout, world)


def resume_all(
    model: Path, home: Path, chosen: list[Case], steps: tuple[int, ...], report: Callable[[Found], None]
) -> Found:
    """Each case run whole, then from its checkpoint after each of `steps`."""
    found, data = Found(), write_rows(home / "rows.jsonl", 12)
    for case in chosen:
        whole, part = home / "exact-whole", home / "exact-part"
        shutil.rmtree(whole, ignore_errors=True)
        _run(case, case.recipe(model, data, whole), home, found)
        found.cases += 1
        for step in steps:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            shutil.copy(whole / "metrics.jsonl", part)
            shutil.copytree(whole / f"checkpoint-{step:06d}", part / f"checkpoint-{step:06d}")
            _run(case, case.recipe(model, data, part), home, found)
            found.resumes += 1
            difference = _difference(whole, part)
            found.max_difference = max(found.max_difference, difference)
            found.other_lines += any(metrics(whole, event) != metrics(part, event) for event in ("train", "eval"))
            if difference:
                found.notes.append(f"{case} from step {step}: {difference}")
            report(found)
    for folder in ("exact-whole", "exact-part"):
        shutil.rmtree(home / folder, ignore_errors=True)
    return found


def _run(case: Case, recipe: Recipe, home: Path, found: Found) -> None:
    def work(rank: int, tell: Tell) -> None:
        train(recipe, quiet=True)

    children = pair(work, home) if case.world == 2 else [Child(lambda tell: work(0, tell), home / "said-0")]
    if any(child.end() for child in children):
        found.failed += 1
        found.notes.append(f"{case}: {(home / 'said-0').read_text()[-500:]}")
    (home / "said-0").unlink(missing_ok=True)


def _difference(whole: Path, part: Path) -> float:
    """Between the adapters, and between the last checkpoints' optimiser states."""
    last = f"checkpoint-{STEPS:06d}/{OPTIMIZER}"
    tables = (
        (adapter_tensors(whole), adapter_tensors(part)),
        (peft_files.read_named(whole / last), peft_files.read_named(part / last)),
    )
    worst = 0.0
    for ours, theirs in tables:
        assert ours.keys() == theirs.keys()
        worst = max(worst, *(float((ours[n].double() - theirs[n].double()).abs().max()) for n in ours))
        assert worst or all(torch.equal(ours[name], theirs[name]) for name in ours)
    return worst
