"""`kill -9` at every file-system call of a save and at random moments of a run: is a finished checkpoint ever lost?"""

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from qlora.adapters import peft_files
from qlora.recipe.recipe import Recipe
from qlora.runs.train import train
from qlora.training.checkpoint import Checkpoints, Position, read
from qlora.utils.atomic_folders import remove_leftovers
from support.child_processes import Child, Notify, kill_at_call, notify_phases
from support.small_runs import differing_tensors, recipe_of, run, write_records

SAVES = (1, 2, 2, 3)  # steps that are saved, step 2 twice; with keep=1, so that each save but the first removes one


@dataclass
class Result:
    """Counts of kills, and of what they damaged."""

    kills: int = 0
    lost: int = 0  # finished checkpoints that could not be read again
    half_read: int = 0  # checkpoints that verified, but whose contents are not what was saved
    litter: int = 0  # temporary files left after the next start
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.half_read or self.litter)


class Store:
    """Checkpoints of one parameter whose value is its step."""

    def __init__(self, folder: Path) -> None:
        self.parameter = nn.Parameter(torch.zeros(64, 16))
        self.optimizer = torch.optim.AdamW([self.parameter], lr=0.0, weight_decay=0.0)
        self.checkpoints = Checkpoints(folder, 1, self.write_adapter, {"a": 1})

    def write_adapter(self, folder: Path) -> None:
        (folder / peft_files.WEIGHTS).write_bytes(peft_files.serialize({"A": self.parameter.detach()}))
        (folder / peft_files.CONFIG).write_text("{}")

    def save_all(self, notify: Notify) -> None:
        """Save the steps of SAVES, each with different values; leftovers are removed first, as at a run's start."""
        remove_leftovers(self.checkpoints.output)
        for number, step in enumerate(SAVES):
            self.step_to(step + number / 10)
            self.checkpoints.save(Position(step=step, loss=step + number / 10), self.optimizer, {"p": self.parameter})
            notify(f"saved {step}")

    def step_to(self, value: float) -> None:
        self.parameter.data.fill_(value)
        self.parameter.grad = torch.full_like(self.parameter, value)
        self.optimizer.state.clear()
        self.optimizer.step()
        self.parameter.data.fill_(value)


def check_store(store: Store, finished: int, result: Result) -> None:
    """The newest checkpoint that verifies must be complete, and not older than step `finished`."""
    remove_leftovers(store.checkpoints.output)
    result.litter += sum(path.name.startswith(".") for path in store.checkpoints.output.iterdir())
    saved, skipped = store.checkpoints.newest()
    result.litter += len(skipped)
    if (saved.position.step if saved else 0) < finished:
        result.lost += 1
        result.notes.append(f"step {finished} was finished, the newest checkpoint is {saved and saved.folder.name}")
    if saved:
        value = saved.position.loss
        tensors = peft_files.read_tensors(saved.folder / peft_files.WEIGHTS)
        moment = peft_files.read_tensors(saved.folder / "optimizer.safetensors")["p/exp_avg"]
        complete = torch.equal(tensors["A"], torch.full((64, 16), value)) and torch.allclose(
            moment, torch.tensor(value / 10)
        )
        result.half_read += not complete


def kill_at_calls(home: Path, every: int, first: int, report: Callable[[Result], None]) -> Result:
    """Kill at call `first`, `first + every`, ... of the saves, until a child finishes."""
    result, number = Result(), first
    while True:
        folder = home / "grid"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        store = Store(folder)

        def work(notify: Notify, store: Store = store, number: int = number) -> None:
            kill_at_call(number)
            store.save_all(notify)

        child = Child(work, home / "log")
        code = child.wait()
        if code == 0:
            return result
        assert code == 128 + signal.SIGKILL, (home / "log").read_text()
        result.kills += 1
        finished = max([int(line.split()[1]) for line in child.lines()], default=0)
        check_store(store, finished, result)
        report(result)
        number += every


def recipe_of_kills(model: Path, data: Path, output: Path, keep: int = 2) -> Recipe:
    return recipe_of(
        model, data, output, "train.max_steps=4", "train.save_every=1", f"train.keep={keep}", "adapter.dropout=0.1"
    )


def kill_at_moments(model: Path, home: Path, kills: int, seed: int, report: Callable[[Result], None]) -> Result:
    """Kill runs at random moments and start them again in the same folder; after a finished run, in an empty one."""
    rng, result = random.Random(seed), Result()
    data = write_records(home / "rows.jsonl", 10)
    uninterrupted = home / "uninterrupted"
    run(recipe_of_kills(model, data, uninterrupted, keep=99))  # warm-up: libraries import more on their first run
    started = time.monotonic()
    run(recipe_of_kills(model, data, home / "timed"))
    seconds = time.monotonic() - started
    output, finished = home / "killed", 0
    while result.kills < kills:
        child = Child(_training(recipe_of_kills(model, data, output)), home / "log")
        child.wait_for("loading")
        time.sleep(rng.uniform(0, seconds))
        child.send(signal.SIGKILL)
        code = child.wait()
        finished = max([finished, *(int(line.split()[1]) for line in child.lines() if line.startswith("saved"))])
        if code == 0:
            result.half_read += differing_tensors(uninterrupted, output) != []
            shutil.rmtree(output)
            finished = 0
            continue
        assert code == 128 + signal.SIGKILL, (home / "log").read_text()[-2000:]
        result.kills += 1
        _check_run(output, uninterrupted, finished, result)
        report(result)
    shutil.rmtree(output, ignore_errors=True)
    return result


def _training(recipe: Recipe) -> Callable[[Notify], None]:
    def work(notify: Notify) -> None:
        with notify_phases(notify):
            train(recipe, quiet=True)

    return work


def _check_run(output: Path, uninterrupted: Path, finished: int, result: Result) -> None:
    """The newest checkpoint that verifies must equal the uninterrupted run's checkpoint of that step."""
    saved, skipped = Checkpoints(output, 2, lambda folder: None, {}).newest() if output.is_dir() else (None, [])
    step = saved.position.step if saved else 0
    if step < finished or skipped:
        result.lost += 1
        result.notes.append(f"step {finished} was finished, the newest checkpoint is step {step}; {skipped}")
    expected = uninterrupted / f"checkpoint-{step:06d}"
    if saved and expected.is_dir():
        result.half_read += differing_tensors(saved.folder, expected) != [] or read(expected).position != saved.position
