"""SIGTERM and SIGINT in every phase of a run: each must end in an exact checkpoint, or refuse before the first step."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora.cli.app import run as run_cli
from qlora.recipe.recipe import Recipe, dump
from qlora.training.checkpoint import Checkpoints
from support.child_processes import GIVE_UP_SECONDS, PHASES, Child, Tell, tell_phases
from support.paths import ROOT
from support.rank_processes import pair
from support.small_runs import differing, metrics, recipe_of, run, write_rows

STEPS = 6
LAUNCHES = ((1, "auto"), (2, "fsdp"), (2, "ddp"))


@dataclass
class Found:
    """What became of the signals."""

    signals: int = 0
    exact: int = 0  # stopped at a checkpoint of the step logged last; resumed, the run is the one never stopped
    refused: int = 0  # before the first step: nothing was written that was not there
    finished: int = 0  # came when the last step was done: the run ended as if nothing had been
    wrong: int = 0
    orphans: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.wrong or self.orphans)


def recipe_of_stops(model: Path, data: Path, output: Path, *more: str) -> Recipe:
    options = ("data.eval_fraction=0.2", "train.eval_every=2", "adapter.dropout=0.1", f"train.max_steps={STEPS}")
    # train_on all: then there are no questions for the report's samples, whose answers would take most of the time.
    return recipe_of(model, data, output, *options, "train.save_every=3", "train.keep=99", "data.train_on=all", *more)


def stop(model: Path, home: Path, count: int, seed: int, report: Callable[[Found], None], world: int = 1) -> Found:
    """`count` signals, spread evenly over the phases, each at a random moment after its phase began."""
    draw, found = random.Random(seed), Found()
    data = write_rows(home / "rows.jsonl", 12)
    whole = home / f"whole-{world}"
    if world == 1:
        run(recipe_of_stops(model, data, whole))
    else:
        assert [child.end() for child in pair(_in_two(recipe_of_stops(model, data, whole), home), home)] == [0, 0]
    while found.signals < count:
        phase = PHASES[found.signals % len(PHASES)]
        number = draw.choice((signal.SIGTERM, signal.SIGINT))
        output = home / "stopped"
        shutil.rmtree(output, ignore_errors=True)
        # Two processes with a whole base each, or with shares of one, give the same bits.
        strategy = "single" if world == 1 else draw.choice(("ddp", "fsdp"))
        recipe = recipe_of_stops(model, data, output, f"distributed.kind={strategy}")
        children = _started(recipe, home, world)
        heard = children[0].wait_for(phase, times=draw.randint(1, {"training": STEPS, "evaluating": 3}.get(phase, 1)))
        time.sleep(draw.uniform(0, 0.05))
        for child in children:
            child.send(number)
        codes = [child.end() for child in children]
        found.signals += 1
        met = phase if heard else "finished"
        found.phases[met] = found.phases.get(met, 0) + 1
        found.orphans += sum(child.orphans() for child in children)
        before = found.wrong, "".join(path.read_text()[-400:] for path in home.glob("said*"))
        _judge(codes, number, output, found)
        if codes[0]:
            again = [child.end() for child in _started(recipe, home, world)]
            same = all(metrics(whole, event) == metrics(output, event) for event in ("train", "eval"))
            if any(again) or differing(whole, output) or not same:
                found.wrong += 1
        if found.wrong > before[0]:
            found.notes.append(f"{phase} {number}: codes {codes}, {before[1]}")
        for path in home.glob("said*"):
            path.unlink()
        report(found)
    shutil.rmtree(home / "stopped", ignore_errors=True)
    return found


def stop_launched(model: Path, home: Path, count: int, seed: int, report: Callable[[Found], None]) -> Found:
    """`count` signals to `accelerate launch`, each a random while after the first line: one process, DDP, FSDP."""
    draw, found = random.Random(seed), Found()
    data, file, output = write_rows(home / "rows.jsonl", 12), home / "recipe.yaml", home / "launched"
    endless = ("train.max_steps=100000", "train.save_every=null", "optim.warmup=0", "data.eval_fraction=0")
    for number in range(count):
        shutil.rmtree(output, ignore_errors=True)
        world, strategy = LAUNCHES[number % len(LAUNCHES)]
        file.write_text(dump(recipe_of(model, data, output, *endless, f"distributed.kind={strategy}")))
        kind = draw.choice((signal.SIGTERM, signal.SIGINT))
        launcher = _launch(world, file, home)
        give_up = time.monotonic() + GIVE_UP_SECONDS
        while (
            not (metrics(output) if output.is_dir() else []) and time.monotonic() < give_up and launcher.poll() is None
        ):
            time.sleep(0.1)
        time.sleep(draw.uniform(0, 2))
        family = _family(launcher.pid)
        trainers = _trainers(family)
        launcher.send_signal(kind)
        launcher.wait(timeout=GIVE_UP_SECONDS)
        found.signals += 1
        found.orphans += _left(family)
        last = metrics(output)[-1]["step"]
        saved, skipped = Checkpoints(output, 9, lambda folder: None, {}).newest()
        exact = saved is not None and saved.position.step == last and not skipped and trainers == world
        found.exact += exact
        found.wrong += not exact
        if not exact:
            found.notes.append(
                f"{kind} {trainers} of {world} {strategy}: logged {last}, saved {saved and saved.folder.name}"
            )
        report(found)
    shutil.rmtree(output, ignore_errors=True)
    return found


def _launch(world: int, file: Path, home: Path) -> "subprocess.Popen[bytes]":
    # With --cpu accelerate starts one process only; --multi_gpu starts several, which without cards meet over gloo.
    where = "--cpu" if world == 1 else "--multi_gpu"
    options = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", where)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "accelerate.commands.launch", "--num_processes", str(world), *options, "--main_process_port", port]
    with (home / "said-launcher").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, *command, "-m", "qlora", "train", str(file)], stdout=said, stderr=said,
            start_new_session=True, cwd=ROOT, preexec_fn=_hears_interrupts,
        )  # fmt: skip


def _hears_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _left(family: Mapping[int, str]) -> int:
    """Processes of a launch that are still there after a minute: a busy machine stops slowly."""
    for _ in range(600):
        there = [pid for pid, began in family.items() if _stat_of(pid)[1] == began]
        if not there:
            return 0
        time.sleep(0.1)
    for pid in there:
        os.kill(pid, signal.SIGKILL)
    return len(there)


def _family(ancestor: int) -> dict[int, str]:
    """A process and all that it has started, directly or not, with the time of their starts; sessions differ."""
    stats = {int(path.name): _stat_of(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    family = {ancestor}
    while more := {pid for pid, (parent, _) in stats.items() if parent in family} - family:
        family |= more
    return {pid: stats[pid][1] for pid in family if stats.get(pid, (0, ""))[1]}


def _trainers(family: Iterable[int]) -> int:
    """How many of these processes train."""
    said = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:5] for pid in family]
    return sum(
        words[-4:-1] == [b"-m", b"qlora", b"train"] or words[-3:] == [b"-m", b"qlora", b"train"] for words in said
    )


def _stat_of(pid: int) -> tuple[int, str]:
    """Parent and start of a process; no start for one that is gone or only waits to be buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return (0, "") if fields[0] in "ZX" else (int(fields[1]), fields[19])


def _started(recipe: Recipe, home: Path, world: int) -> list[Child]:
    if world == 2:
        return pair(_in_two(recipe, home), home)
    return [Child(_in_one(recipe, home), home / "said")]


def _in_one(recipe: Recipe, home: Path) -> Callable[[Tell], int]:
    """`qlora train` as a user types it."""
    file = home / "recipe.yaml"
    file.write_text(dump(recipe))

    def work(tell: Tell) -> int:
        tell_phases(tell)
        return run_cli(["train", str(file)])

    return work


def _in_two(recipe: Recipe, home: Path) -> Callable[[int, Tell], int]:
    single = _in_one(recipe, home)
    return lambda rank, tell: single(tell)


def _judge(codes: list[int], number: int, output: Path, found: Found) -> None:
    """The exit codes, and whether the newest checkpoint is of the very step logged last."""
    lines = [line["step"] for line in metrics(output)] if output.is_dir() else []
    saved, skipped = Checkpoints(output, 9, lambda folder: None, {}).newest() if output.is_dir() else (None, [])
    if codes[0] == 0:  # another rank, which writes nothing, may be in its last breath when the signal comes
        done = (output / "run.json").is_file() and json.loads((output / "run.json").read_text())["result"]["steps"]
        found.finished += done == STEPS
        found.wrong += done != STEPS
    elif set(codes) != {128 + number} or skipped:
        found.wrong += 1
    elif not lines:
        found.refused += saved is None
        found.wrong += saved is not None
    else:
        exact = saved is not None and saved.position.step == lines[-1]
        found.exact += exact
        found.wrong += not exact
