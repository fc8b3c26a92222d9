"""`kill -9` at every file-system call of a save, and at random moments of a run: is a finished checkpoint ever lost?"""

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
from qlora.utils.atomic_folders import sweep
from support.child_processes import Child, Tell, die_at_call, tell_phases
from support.small_runs import differing, recipe_of, run, write_rows

SAVES = (1, 2, 2, 3)  # one after the other, the second one again; with keep=1, so that each but the first removes one


@dataclass
class Found:
    """What became of the kills."""

    kills: int = 0
    lost: int = 0  # finished checkpoints that could not be read again
    half_read: int = 0  # checkpoints that verified, but held something else than what was saved
    litter: int = 0  # names left after the next start
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.half_read or self.litter)


class Store:
    """Checkpoints of a parameter that holds the number of its step."""

    def __init__(self, folder: Path) -> None:
        self.parameter = nn.Parameter(torch.zeros(64, 16))
        self.optimizer = torch.optim.AdamW([self.parameter], lr=0.0, weight_decay=0.0)
        self.checkpoints = Checkpoints(folder, 1, self.write_adapter, {"a": 1})

    def write_adapter(self, folder: Path) -> None:
        (folder / peft_files.WEIGHTS).write_bytes(peft_files.serialize({"A": self.parameter.detach()}))
        (folder / peft_files.CONFIG).write_text("{}")

    def save_all(self, tell: Tell) -> None:
        """The saves, each with other values; a new process starts with a sweep, as a run does."""
        sweep(self.checkpoints.output)
        for number, step in enumerate(SAVES):
            self.step_to(step + number / 10)
            self.checkpoints.save(Position(step=step, loss=step + number / 10), self.optimizer, {"p": self.parameter})
            tell(f"saved {step}")

    def step_to(self, value: float) -> None:
        self.parameter.data.fill_(value)
        self.parameter.grad = torch.full_like(self.parameter, value)
        self.optimizer.state.clear()
        self.optimizer.step()
        self.parameter.data.fill_(value)


def look(store: Store, finished: int, found: Found) -> None:
    """Judge what a kill has left: the newest checkpoint that verifies must be whole, and not older than `finished`."""
    sweep(store.checkpoints.output)
    found.litter += sum(path.name.startswith(".") for path in store.checkpoints.output.iterdir())
    saved, skipped = store.checkpoints.newest()
    found.litter += len(skipped)
    if (saved.position.step if saved else 0) < finished:
        found.lost += 1
        found.notes.append(f"{finished} was finished, {saved and saved.folder.name} is what is left")
    if saved:
        value = saved.position.loss
        tensors = peft_files.read_named(saved.folder / peft_files.WEIGHTS)
        moment = peft_files.read_named(saved.folder / "optimizer.safetensors")["p/exp_avg"]
        whole = torch.equal(tensors["A"], torch.full((64, 16), value)) and torch.allclose(
            moment, torch.tensor(value / 10)
        )
        found.half_read += not whole


def kill_at_calls(home: Path, every: int, first: int, report: Callable[[Found], None]) -> Found:
    """Kill at call `first`, `first + every`, ... of the saves, until a child lives to the end."""
    found, number = Found(), first
    while True:
        folder = home / "grid"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        store = Store(folder)

        def work(tell: Tell, store: Store = store, number: int = number) -> None:
            die_at_call(number)
            store.save_all(tell)

        child = Child(work, home / "said")
        code = child.end()
        if code == 0:
            return found
        assert code == 128 + signal.SIGKILL, (home / "said").read_text()
        found.kills += 1
        finished = max([int(line.split()[1]) for line in child.lines()], default=0)
        look(store, finished, found)
        report(found)
        number += every


def recipe_of_kills(model: Path, data: Path, output: Path, keep: int = 2) -> Recipe:
    return recipe_of(model, data, output, "train.save_every=1", f"train.keep={keep}", "adapter.dropout=0.1")


def kill_at_moments(model: Path, home: Path, kills: int, seed: int, report: Callable[[Found], None]) -> Found:
    """Kill whole runs at random moments and start them again in the same folder; a finished one starts anew."""
    draw, found = random.Random(seed), Found()
    data = write_rows(home / "rows.jsonl", 10)
    whole = home / "whole"
    run(recipe_of_kills(model, data, whole, keep=99))  # warm: libraries import more on their first run
    started = time.monotonic()
    run(recipe_of_kills(model, data, home / "timed"))
    seconds = time.monotonic() - started
    output, finished = home / "killed", 0
    while found.kills < kills:
        child = Child(_training(recipe_of_kills(model, data, output)), home / "said")
        child.wait_for("loading")
        time.sleep(draw.uniform(0, seconds))
        child.send(signal.SIGKILL)
        code = child.end()
        finished = max([finished, *(int(line.split()[1]) for line in child.lines() if line.startswith("saved"))])
        if code == 0:
            found.half_read += differing(whole, output) != []
            shutil.rmtree(output)
            finished = 0
            continue
        assert code == 128 + signal.SIGKILL, (home / "said").read_text()[-2000:]
        found.kills += 1
        _judge(output, whole, finished, found)
        report(found)
    shutil.rmtree(output, ignore_errors=True)
    return found


def _training(recipe: Recipe) -> Callable[[Tell], None]:
    def work(tell: Tell) -> None:
        tell_phases(tell)
        train(recipe, quiet=True)

    return work


def _judge(output: Path, whole: Path, finished: int, found: Found) -> None:
    """The newest checkpoint that verifies must be that very step of the run that was never killed."""
    saved, skipped = Checkpoints(output, 2, lambda folder: None, {}).newest() if output.is_dir() else (None, [])
    step = saved.position.step if saved else 0
    if step < finished or skipped:
        found.lost += 1
        found.notes.append(f"step {finished} was finished, step {step} is what is left; {skipped}")
    twin = whole / f"checkpoint-{step:06d}"
    if saved and twin.is_dir():
        found.half_read += differing(saved.folder, twin) != [] or read(twin).position != saved.position
