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
from support.child_processes import GIVE_UP_SECONDS, PHASES, Child, Notify, notify_phases
from support.paths import ROOT
from support.rank_processes import pair
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records

STEPS = 6
LAUNCHES = ((1, "auto"), (2, "fsdp"), (2, "ddp"))


@dataclass
class Result:
    """Counts of signals, and of how the runs ended."""

    signals: int = 0
    exact: int = 0  # with a checkpoint of the step logged last; the resumed run equals the uninterrupted one
    refused: int = 0  # before the first step, without a checkpoint
    finished: int = 0  # normally, because the signal came after the last step
    wrong: int = 0  # in any other way
    orphans: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.wrong or self.orphans)


def recipe_of_stops(model: Path, data: Path, output: Path, *overrides: str) -> Recipe:
    options = ("data.eval_fraction=0.2", "train.eval_every=2", "adapter.dropout=0.1", f"train.max_steps={STEPS}")
    # train_on all: without prompts the report generates no samples, which would take most of the time.
    options += ("train.save_every=3", "train.keep=99", "data.train_on=all")
    return recipe_of(model, data, output, *options, *overrides)


def send_signals(
    model: Path, home: Path, count: int, seed: int, report: Callable[[Result], None], world: int = 1
) -> Result:
    """Send `count` signals, spread evenly over the phases, each at a random moment after its phase began."""
    rng, result = random.Random(seed), Result()
    data = write_records(home / "rows.jsonl", 12)
    uninterrupted = home / f"uninterrupted-{world}"
    if world == 1:
        run(recipe_of_stops(model, data, uninterrupted))
    else:
        recipe = recipe_of_stops(model, data, uninterrupted)
        assert [child.wait() for child in _start(recipe, home, world)] == [0, 0]
    while result.signals < count:
        phase = PHASES[result.signals % len(PHASES)]
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        output = home / "stopped"
        shutil.rmtree(output, ignore_errors=True)
        # Two ranks give the same bits with DDP and FSDP.
        strategy = "single" if world == 1 else rng.choice(("ddp", "fsdp"))
        recipe = recipe_of_stops(model, data, output, f"distributed.kind={strategy}")
        children = _start(recipe, home, world)
        reached = children[0].wait_for(phase, times=rng.randint(1, {"training": STEPS, "evaluating": 3}.get(phase, 1)))
        time.sleep(rng.uniform(0, 0.05))
        for child in children:
            child.send(number)
        codes = [child.wait() for child in children]
        result.signals += 1
        label = phase if reached else "finished"
        result.phases[label] = result.phases.get(label, 0) + 1
        result.orphans += sum(child.orphans() for child in children)
        wrong_before, logs = result.wrong, "".join(path.read_text()[-400:] for path in home.glob("log*"))
        _check_exit(codes, number, output, result)
        if codes[0]:
            resumed_codes = [child.wait() for child in _start(recipe, home, world)]
            same = all(metrics(uninterrupted, event) == metrics(output, event) for event in ("train", "eval"))
            if any(resumed_codes) or differing_tensors(uninterrupted, output) or not same:
                result.wrong += 1
        if result.wrong > wrong_before:
            result.notes.append(f"{phase} {number}: codes {codes}, {logs}")
        for path in home.glob("log*"):
            path.unlink()
        report(result)
    shutil.rmtree(home / "stopped", ignore_errors=True)
    return result


def signal_launchers(model: Path, home: Path, count: int, seed: int, report: Callable[[Result], None]) -> Result:
    """Send `count` signals to `accelerate launch` at a random moment of training: one process, DDP, FSDP."""
    rng, result = random.Random(seed), Result()
    data, file, output = write_records(home / "rows.jsonl", 12), home / "recipe.yaml", home / "launched"
    endless = ("train.max_steps=100000", "train.save_every=null", "optim.warmup=0", "data.eval_fraction=0")
    for number in range(count):
        shutil.rmtree(output, ignore_errors=True)
        world, strategy = LAUNCHES[number % len(LAUNCHES)]
        file.write_text(dump(recipe_of(model, data, output, *endless, f"distributed.kind={strategy}")))
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        launcher = _launch(world, file, home)
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while not (output.is_dir() and metrics(output)) and time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 2))
        processes = _descendants(launcher.pid)
        trainers = _count_trainers(processes)
        launcher.send_signal(number)
        launcher.wait(timeout=GIVE_UP_SECONDS)
        result.signals += 1
        result.orphans += _count_orphans(processes)
        last = metrics(output)[-1]["step"]
        saved, skipped = Checkpoints(output, 9, lambda folder: None, {}).newest()
        exact = saved is not None and saved.position.step == last and not skipped and trainers == world
        result.exact += exact
        result.wrong += not exact
        if not exact:
            result.notes.append(
                f"{number} {trainers} of {world} {strategy}: logged {last}, saved {saved and saved.folder.name}"
            )
        report(result)
    shutil.rmtree(output, ignore_errors=True)
    return result


def _launch(world: int, file: Path, home: Path) -> "subprocess.Popen[bytes]":
    # With --cpu accelerate starts one process only; --multi_gpu starts several, which use gloo without GPUs.
    device = "--cpu" if world == 1 else "--multi_gpu"
    options = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "accelerate.commands.launch", "--num_processes", str(world), *options, "--main_process_port", port]
    with (home / "launcher-log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command, "-m", "qlora", "train", str(file)], stdout=log, stderr=log,
            start_new_session=True, cwd=ROOT, preexec_fn=_reset_interrupts,
        )  # fmt: skip


def _reset_interrupts() -> None:
    """A shell's background processes, and their children, ignore SIGINT unless it is reset."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _count_orphans(processes: Mapping[int, str]) -> int:
    """Processes of a launch that still exist after a minute: a busy machine stops slowly."""
    for _ in range(600):
        running = [pid for pid, started in processes.items() if _parent_and_start(pid)[1] == started]
        if not running:
            return 0
        time.sleep(0.1)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return len(running)


def _descendants(ancestor: int) -> dict[int, str]:
    """A process and all its descendants, with their start times; they are in different sessions."""
    stats = {int(path.name): _parent_and_start(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    pids = {ancestor}
    while children := {pid for pid, (parent, _) in stats.items() if parent in pids} - pids:
        pids |= children
    return {pid: stats[pid][1] for pid in pids if stats.get(pid, (0, ""))[1]}


def _count_trainers(pids: Iterable[int]) -> int:
    """How many of these processes train."""
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:5] for pid in pids]
    train = [b"-m", b"qlora", b"train"]
    return sum(command[-4:-1] == train or command[-3:] == train for command in commands)


def _parent_and_start(pid: int) -> tuple[int, str]:
    """Parent and start time of a process; an empty start if the process has exited or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return (0, "") if fields[0] in "ZX" else (int(fields[1]), fields[19])


def _start(recipe: Recipe, home: Path, world: int) -> list[Child]:
    """`qlora train` in one process or two ranks."""
    file = home / "recipe.yaml"
    file.write_text(dump(recipe))

    def work(notify: Notify) -> int:
        with notify_phases(notify):
            return run_cli(["train", str(file)])

    if world == 2:
        return pair(lambda rank, notify: work(notify), home)
    return [Child(work, home / "log")]


def _check_exit(codes: list[int], number: int, output: Path, result: Result) -> None:
    """The exit codes are right, and the newest checkpoint is of the step logged last."""
    lines = [line["step"] for line in metrics(output)] if output.is_dir() else []
    saved, skipped = Checkpoints(output, 9, lambda folder: None, {}).newest() if output.is_dir() else (None, [])
    if codes[0] == 0:  # the other rank, which writes nothing, may receive the signal while it exits
        done = (output / "run.json").is_file() and json.loads((output / "run.json").read_text())["result"]["steps"]
        result.finished += done == STEPS
        result.wrong += done != STEPS
    elif set(codes) != {128 + number} or skipped:
        result.wrong += 1
    elif not lines:
        result.refused += saved is None
        result.wrong += saved is not None
    else:
        exact = saved is not None and saved.position.step == lines[-1]
        result.exact += exact
        result.wrong += not exact
