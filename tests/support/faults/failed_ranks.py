"""Ranks that die, by kill -9 or by an error of their own: the others must end at once, and one of all says why."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qlora.cli.app import run as run_cli
from qlora.recipe.recipe import dump
from qlora.training import loop
from support.child_processes import Child, Tell, tell_phases
from support.rank_processes import ranks
from support.small_runs import recipe_of, write_rows

HANG_SECONDS = 15.0
PHASES = ("loading", "training", "evaluating")
PLANTED = "planted: this rank fails"


@dataclass
class Found:
    """What became of the processes that were left."""

    ranks: int = 0  # that died
    hangs: int = 0  # processes left that took more than HANG_SECONDS to end
    unpunished: int = 0  # processes that ended as if nothing had been
    orphans: int = 0
    unsaid: int = 0  # deaths that were not said exactly once
    slowest_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.hangs or self.unpunished or self.orphans or self.unsaid)


def part(model: Path, home: Path, count: int, seed: int, report: Callable[[Found], None]) -> Found:
    """`count` ranks of two or three die: DDP and FSDP, killed and failing, at a random moment of a phase."""
    draw, found = random.Random(seed), Found()
    data, file = write_rows(home / "rows.jsonl", 12), home / "recipe.yaml"
    endless = ("train.max_steps=100000", "optim.warmup=0", "data.eval_fraction=0.2", "train.eval_every=2")
    for number in range(count):
        world, kind, killed = 2 + (number // 4) % 2, ("ddp", "fsdp")[number % 2], number // 2 % 2 == 0
        options = (*endless, "data.train_on=all", f"distributed.kind={kind}", "train.resume=never")
        file.write_text(dump(recipe_of(model, data, home / f"run-{number}", *options)))
        victim, step = draw.randrange(world), draw.randint(1, 6)
        children = ranks(_fails_at(file, victim, -1 if killed else step), home, world)
        phase = PHASES[number % 3] if killed else "failing"
        children[victim].wait_for(phase, times=1 if phase == "loading" else 1 if not killed else draw.randint(1, 3))
        if killed:
            time.sleep(draw.uniform(0, 0.1))
            children[victim].send(signal.SIGKILL)
        codes, seconds = _ended(children, victim)
        said = "".join((home / f"said-{rank}").read_text() for rank in range(world))
        found.ranks += 1
        found.hangs += seconds > HANG_SECONDS
        found.slowest_seconds = max(found.slowest_seconds, round(seconds, 2))
        found.unpunished += sum(code == 0 for code in codes)
        found.orphans += sum(child.orphans() for child in children)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        once = len(lines) == 1 and (killed or PLANTED in lines[0])
        found.unsaid += not once
        if not once or seconds > HANG_SECONDS or 0 in codes:
            found.notes.append(f"{kind} x{world} {phase} {codes} {seconds:.1f} s: {said[-600:]}")
        for path in home.glob("said*"):
            path.unlink()
        report(found)
    return found


def _ended(children: list[Child], victim: int) -> tuple[list[int], float]:
    """The exit codes, and the seconds from the victim's end to that of the last one."""
    codes = {victim: children[victim].end()}
    began = time.monotonic()
    codes |= {rank: child.end() for rank, child in enumerate(children) if rank != victim}
    return [codes[rank] for rank in range(len(children))], time.monotonic() - began


def _fails_at(file: Path, victim: int, step: int) -> Callable[[int, Tell], int]:
    """`qlora train`, of which rank `victim` fails in optimizer step `step`."""

    def work(rank: int, tell: Tell) -> int:
        tell_phases(tell)
        taken = loop._step

        def fails(job: object, number: int) -> object:
            if number + 1 == step and rank == victim:
                tell("failing")
                raise OSError(PLANTED)
            return taken(job, number)  # type: ignore[arg-type]

        loop._step = fails  # type: ignore[assignment]
        return run_cli(["train", str(file)])

    return work
