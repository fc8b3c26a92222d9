"""Ranks that are killed or raise an error: the other ranks must exit at once, and exactly one prints the reason."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qlora.cli.app import run as run_cli
from qlora.recipe.recipe import dump
from support.child_processes import Child, Notify, notify_phases
from support.rank_processes import ranks
from support.small_runs import recipe_of, write_records
from support.training_hooks import before_update

HANG_SECONDS = 15.0
PHASES = ("loading", "training", "evaluating")
PLANTED = "planted: this rank fails"


@dataclass
class Result:
    """Counts of failed ranks, and of what went wrong in the others."""

    ranks: int = 0  # killed or failed
    hangs: int = 0  # ranks that took more than HANG_SECONDS to exit
    survivors: int = 0  # ranks that exited with code 0
    orphans: int = 0
    unreported: int = 0  # failures that were not reported exactly once
    slowest_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.hangs or self.survivors or self.orphans or self.unreported)


def fail_ranks(model: Path, home: Path, numbers: range, seed: int, report: Callable[[Result], None]) -> Result:
    """Fail one of two or three ranks: DDP and FSDP by turns, two killed and two raising, at a random moment."""
    rng, result = random.Random(seed), Result()
    data, file = write_records(home / "rows.jsonl", 12), home / "recipe.yaml"
    endless = ("train.max_steps=100000", "optim.warmup=0", "data.eval_fraction=0.2", "train.eval_every=2")
    for number in numbers:
        world, kind, killed = 2 + (number // 4) % 2, ("ddp", "fsdp")[number % 2], number // 2 % 2 == 0
        options = (*endless, "data.train_on=all", f"distributed.kind={kind}", "train.resume=never")
        file.write_text(dump(recipe_of(model, data, home / f"run-{number}", *options)))
        victim, step = rng.randrange(world), rng.randint(1, 6)
        children = ranks(_fails_at(file, victim, -1 if killed else step), home, world)
        phase = PHASES[number % 3] if killed else "failing"
        children[victim].wait_for(phase, times=1 if phase == "loading" else 1 if not killed else rng.randint(1, 3))
        if killed:
            time.sleep(rng.uniform(0, 0.1))
            children[victim].send(signal.SIGKILL)
        codes, seconds = _wait_for_all(children, victim)
        output = "".join((home / f"log-{rank}").read_text() for rank in range(world))
        result.ranks += 1
        result.hangs += seconds > HANG_SECONDS
        result.slowest_seconds = max(result.slowest_seconds, round(seconds, 2))
        result.survivors += sum(code == 0 for code in codes)
        result.orphans += sum(child.orphans() for child in children)
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        once = len(lines) == 1 and (killed or PLANTED in lines[0])
        result.unreported += not once
        if not once or seconds > HANG_SECONDS or 0 in codes:
            result.notes.append(f"{kind} x{world} {phase} {codes} {seconds:.1f} s: {output[-600:]}")
        for path in home.glob("log*"):
            path.unlink()
        report(result)
    return result


def _wait_for_all(children: list[Child], victim: int) -> tuple[list[int], float]:
    """The exit codes, and the seconds from the victim's exit to the last rank's."""
    codes = {victim: children[victim].wait()}
    began = time.monotonic()
    codes |= {rank: child.wait() for rank, child in enumerate(children) if rank != victim}
    return [codes[rank] for rank in range(len(children))], time.monotonic() - began


def _fails_at(file: Path, victim: int, step: int) -> Callable[[int, Notify], int]:
    """`qlora train` in which rank `victim` raises an error in optimizer step `step`."""

    def work(rank: int, notify: Notify) -> int:
        def fail(number: int) -> None:
            if number == step and rank == victim:
                notify("failing")
                raise OSError(PLANTED)

        with notify_phases(notify), before_update(fail):
            return run_cli(["train", str(file)])

    return work
