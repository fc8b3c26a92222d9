"""NaN and infinity injected into the loss, a gradient or an activation of one rank: is a non-finite value ever kept?"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora.adapters.inject import adapted
from qlora.runs.train import train
from qlora.training.checkpoint import OPTIMIZER
from qlora.training.loss import TokenLoss
from support.child_processes import Child, Notify
from support.rank_processes import pair
from support.small_runs import adapter_tensors, recipe_of, write_records
from support.training_hooks import before_first_forward, before_forward, trainable

PLACES = ("loss", "gradient", "activation")
VALUES = (float("nan"), float("inf"), float("-inf"))
STEPS = 5


@dataclass(frozen=True)
class Injection:
    """A value added to a tensor of one rank, in one step (from 1); `tensor` selects a parameter or an adapted layer."""

    place: str
    value: float
    step: int
    rank: int
    tensor: int

    @classmethod
    def draw(cls, rng: random.Random, world: int) -> "Injection":
        step, tensor = rng.randint(1, STEPS), rng.randrange(100)
        return cls(rng.choice(PLACES), rng.choice(VALUES), step, rng.randrange(world), tensor)


@dataclass
class Result:
    """Counts of runs with an injection each, and of what went wrong."""

    runs: int = 0
    non_finite_values: int = 0  # in any file of the run
    moved: int = 0  # skipped steps that changed a weight or the optimizer state
    unskipped: int = 0  # non-finite steps that were not skipped
    failed: int = 0  # runs with another exit code than 0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.non_finite_values or self.moved or self.unskipped or self.failed)


@contextmanager
def inject_into_run(injection: Injection, rank: int) -> Iterator[None]:
    """Inside the block the value is added in this process's runs, whose steps must be one micro-batch each."""
    step = 0

    def count_step(model: TokenLoss) -> None:
        nonlocal step
        step += model.training

    def add_value(tensor: Tensor) -> Tensor:
        return tensor + injection.value if step == injection.step and rank == injection.rank else tensor

    def register_hook(model: TokenLoss) -> None:
        if injection.place == "gradient":
            parameters = list(trainable(model).values())
            parameters[injection.tensor % len(parameters)].register_hook(add_value)
        elif injection.place == "loss":
            model.register_forward_hook(lambda module, inputs, loss: add_value(loss) if module.training else loss)
        else:
            layers = list(adapted(model.model).values())
            layers[injection.tensor % len(layers)].register_forward_hook(
                lambda layer, inputs, output: add_value(output) if layer.training else output
            )

    with before_first_forward(register_hook), before_forward(count_step):
        yield


def inject_non_finite(
    model: Path, home: Path, count: int, seed: int, report: Callable[[Result], None], world: int = 1
) -> Result:
    """`count` runs with an injection each, every second one in float16; all their files are read."""
    rng, result = random.Random(seed), Result()
    data = write_records(home / "rows.jsonl", 10)
    for number in range(count):
        injection, output = Injection.draw(rng, world), home / "injected"
        shutil.rmtree(output, ignore_errors=True)
        dtype = ("float16", "float32")[number % 2]
        options = ("train.save_every=1", "train.keep=99", f"train.max_steps={STEPS}", "adapter.dropout=0.1")
        options += (f"model.dtype={dtype}",)
        recipe = recipe_of(model, data, output, *options, "train.micro_batch=4")  # one micro-batch a step

        def work(rank: int, notify: Notify, injection: Injection = injection, recipe: Any = recipe) -> None:
            with inject_into_run(injection, rank):
                train(recipe, quiet=rank > 0)

        children = pair(work, home) if world == 2 else [_single(work, home)]
        codes = [child.wait() for child in children]
        result.runs += 1
        if any(codes):
            result.failed += 1
            result.notes.append(f"{dtype} {injection}: {codes} {(home / 'log-0').read_text()[-300:]}")
        else:
            check_files(output, injection, result)
        (home / "log-0").unlink(missing_ok=True)
        report(result)
    shutil.rmtree(home / "injected", ignore_errors=True)
    return result


def _single(work: Callable[[int, Notify], None], home: Path) -> Child:
    return Child(lambda notify: work(0, notify), home / "log-0")


def check_files(output: Path, injection: Injection, result: Result) -> None:
    """No file holds a non-finite value; the step was skipped and changed neither weights nor optimizer state."""
    for path in output.rglob("*"):
        if path.suffix == ".safetensors":
            result.non_finite_values += sum(
                int((~value.float().isfinite()).sum()) for value in load_file(path).values()
            )
        elif path.suffix in (".json", ".jsonl"):
            result.non_finite_values += len(re.findall(r"\bNaN\b|\bInfinity\b", path.read_text()))
    skipped = json.loads((output / "run.json").read_text())["result"]["skipped_steps"]
    result.unskipped += skipped != 1
    before, after = (output / f"checkpoint-{step:06d}" for step in (injection.step - 1, injection.step))
    if injection.step > 1:
        old, new = adapter_tensors(before), adapter_tensors(after)
        same = all(torch.equal(old[name], new[name]) for name in new)
        result.moved += not (same and (before / OPTIMIZER).read_bytes() == (after / OPTIMIZER).read_bytes())
    if skipped != 1:
        result.notes.append(f"{injection}: {skipped} steps skipped")
