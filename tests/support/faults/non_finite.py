"""NaN and infinity put into the loss, a gradient or an activation, in one process or two: is any of it ever kept?"""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora.adapters.inject import adapted
from qlora.runs import train as walk
from qlora.training import loop
from qlora.training.checkpoint import OPTIMIZER
from support.child_processes import Tell
from support.rank_processes import pair
from support.small_runs import adapter_tensors, recipe_of, write_rows

PLACES = ("loss", "gradient", "activation")
VALUES = (float("nan"), float("inf"), float("-inf"))
STEPS = 5


@dataclass(frozen=True)
class Dose:
    """What is put where, in which step (from 1), by which rank, in which of the trainable tensors."""

    place: str
    value: float
    step: int
    rank: int
    tensor: int

    @classmethod
    def drawn(cls, draw: random.Random, world: int) -> "Dose":
        step, tensor = draw.randint(1, STEPS), draw.randrange(100)
        return cls(draw.choice(PLACES), draw.choice(VALUES), step, draw.randrange(world), tensor)


@dataclass
class Found:
    """What became of the doses."""

    runs: int = 0
    non_finite_values: int = 0  # in any file written
    moved: int = 0  # skipped steps that changed a weight or the optimiser's state
    unskipped: int = 0  # poisoned steps that were not skipped
    failed: int = 0  # runs that did not end well
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.non_finite_values or self.moved or self.unskipped or self.failed)


def poisoned_job(dose: Dose, rank: int) -> None:
    """From now on every job of this process gets the dose. For a child, which ends with it."""
    assemble, take = walk.assemble, loop._step
    at = {"step": 0}

    def step(job: Any, number: int) -> Any:
        at["step"] = number + 1
        return take(job, number)

    def now() -> bool:
        return at["step"] == dose.step and rank == dose.rank

    def spoil(value: Tensor) -> Tensor:
        return value + dose.value if now() else value

    def assembled(*arguments: Any) -> Any:
        job = assemble(*arguments)
        if dose.place == "gradient":
            each = list(job.trainable.values())
            each[dose.tensor % len(each)].register_hook(spoil)
        elif dose.place == "loss":
            job.model.register_forward_hook(lambda model, given, loss: spoil(loss) if model.training else loss)
        else:
            layers = list(adapted(arguments[0].base.model).values())
            layers[dose.tensor % len(layers)].register_forward_hook(
                lambda layer, given, out: spoil(out) if layer.training else out
            )
        return job

    walk.assemble, loop._step = assembled, step


def poison(model: Path, home: Path, count: int, seed: int, report: Callable[[Found], None], world: int = 1) -> Found:
    """`count` runs with a dose each; every file they leave is read."""
    draw, found = random.Random(seed), Found()
    data = write_rows(home / "rows.jsonl", 10)
    for _ in range(count):
        dose, output = Dose.drawn(draw, world), home / "poisoned"
        shutil.rmtree(output, ignore_errors=True)
        options = ("train.save_every=1", "train.keep=99", f"train.max_steps={STEPS}", "adapter.dropout=0.1")
        recipe = recipe_of(model, data, output, *options)

        def work(rank: int, tell: Tell, dose: Dose = dose, recipe: Any = recipe) -> None:
            poisoned_job(dose, rank)
            walk.train(recipe, quiet=rank > 0)

        children = pair(work, home) if world == 2 else [_single(work, home)]
        codes = [child.end() for child in children]
        found.runs += 1
        if any(codes):
            found.failed += 1
            found.notes.append(f"{dose}: {codes} {(home / 'said-0').read_text()[-300:]}")
        else:
            judge(output, dose, found)
        (home / "said-0").unlink(missing_ok=True)
        report(found)
    shutil.rmtree(home / "poisoned", ignore_errors=True)
    return found


def _single(work: Callable[[int, Tell], Any], home: Path) -> Any:
    from support.child_processes import Child

    return Child(lambda tell: work(0, tell), home / "said-0")


def judge(output: Path, dose: Dose, found: Found) -> None:
    """Read every file; the poisoned step must have been skipped, and left all as it was."""
    for path in output.rglob("*"):
        if path.suffix == ".safetensors":
            found.non_finite_values += sum(int((~value.float().isfinite()).sum()) for value in load_file(path).values())
        elif path.suffix in (".json", ".jsonl"):
            found.non_finite_values += len(re.findall(r"\bNaN\b|\bInfinity\b", path.read_text()))
    skipped = json.loads((output / "run.json").read_text())["result"]["skipped_steps"]
    found.unskipped += skipped != 1
    before, after = (output / f"checkpoint-{step:06d}" for step in (dose.step - 1, dose.step))
    if dose.step > 1:
        ours, theirs = adapter_tensors(before), adapter_tensors(after)
        same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
        found.moved += not (same and (before / OPTIMIZER).read_bytes() == (after / OPTIMIZER).read_bytes())
    if skipped != 1:
        found.notes.append(f"{dose}: {skipped} steps skipped")
