"""One variant on its way: what it trains with, its turns on the shared base, and how it ended."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters.round_robin import RoundRobin
from qlora.runs.artifacts import MANIFEST, RECIPE, Cost, RunSetup, leave
from qlora.model.load_base import Base
from qlora.errors import QloraError, Stopped
from qlora.utils.atomic_files import plain_name, read_json, sha256_of
from qlora.memory.planner.memory_plan import Plan
from qlora.recipe.recipe import dump
from qlora.utils.redact import redacted
from qlora.runs.train import (
    ReadRows,
    assemble,
    equip,
    keep_best,
    moments_of,
    refuse_changed_base,
    resume,
)
from qlora.runs.strategy import open_processes
from qlora.runs.sweep.shared_settings import named
from qlora.runs.sweep.variants import Variant
from qlora.training.checkpoint import Position
from qlora.training.signals import StopSignal
from qlora.training.run_log import Log
from qlora.training.loop import Job, passes, rehearse
from qlora.training.oom_recovery import StepDown


@dataclass(frozen=True)
class Shared:
    """What all variants train with."""

    base: Base
    turns: RoundRobin
    plan: Plan | None
    read: ReadRows


class Runner:
    """A variant with its own adapter, data order, optimiser, position and voice. InputError, naming it, if it can't."""

    def __init__(self, variant: Variant, shared: Shared, quiet: bool) -> None:
        """Put the variant's adapter on the base and read its rows."""
        self.variant, self.name, self.shared = variant, variant.name, shared
        self.folder = Path(variant.recipe.train.output)
        self.processes = open_processes(variant.recipe)
        self.log = Log(self.folder, self.processes.track, quiet=quiet, name=self.name)
        self.manifest: Mapping[str, Any] | None = None  # run.json, once the run has ended well
        self.error: Exception | None = None
        self.stopped = False
        self.kept = False  # finished by an earlier sweep
        self.seconds = 0.0  # of its own work, the others' left out
        self._position = Position()
        self._passes: Iterator[Position] = iter(())
        self._job: Job | None = None
        for note in variant.notes:
            self.log.say(note)
        with named(self.name), self._at_work(None):
            self.parts = equip(variant.recipe, self.processes, shared.base, shared.plan, self.log, shared.read)
        shared.turns.keep(self.name)

    @property
    def job(self) -> Job:
        """The loop's working set, between `assemble` and the end."""
        assert self._job is not None
        return self._job

    def found_finished(self) -> bool:
        """Whether an earlier sweep has finished this very run, and its files are as they were written."""
        self.manifest = finished(self.parts) if self.variant.recipe.train.resume == "auto" else None
        if self.manifest is None:
            return False
        self.kept = True
        self.log.say(f"finished before, kept: {self.folder}")
        self._close()
        return True

    def assemble(self, stop: StopSignal, step_down: StepDown) -> None:
        """Make optimiser and checkpoints, on layers that are arranged already."""
        with named(self.name), self._at_work(self.name):
            self._job = assemble(self.parts, self.log, stop, step_down)
        self.processes.start_trackers(self.name, self.variant.recipe.model_dump(mode="json"))

    def resume(self) -> int:
        """Go to the newest checkpoint, if there is one; the bytes that the optimiser has yet to take."""
        with named(self.name), self._at_work(self.name):
            self._position = resume(self.parts, self.job)
        self._passes = passes(self.job, self._position)
        return moments_of(self.parts, self._position)

    def rehearse(self, moment_bytes: int) -> None:
        """Run the longest micro-batch beside the moments of all."""
        with named(self.name), self._at_work(self.name):
            rehearse(self.job, moment_bytes)

    def turn(self, base_sha256: str) -> bool:
        """Take a step, or leave what a run leaves after the last one; False when it is over, for whatever reason."""
        try:
            with self._at_work(self.name):
                position = next(self._passes, None)
                if position is not None:
                    self._position = position
                    return True
                self._leave(base_sha256)
        except Stopped as stopped:
            self.stopped = True
            self.log.say(str(stopped))
        except Exception as error:  # whatever ends this run, the others go on
            self.error = error
            self.log.say_anyway(f"{self.name}: error: {in_a_line(error)}")
        self._close()
        return False

    def _leave(self, base_sha256: str) -> None:
        self.shared.turns.use(None)
        refuse_changed_base(self.parts, base_sha256)
        self.shared.turns.use(self.name)
        keep_best(self.parts, self.job, self._position)
        self.manifest = leave(self.parts, self._position, Cost(self.seconds))

    def _close(self) -> None:
        """Let go of what only this run needed: its adapter, moments and rows' order."""
        self.shared.turns.drop(self.name)
        self._job, self._passes = None, iter(())
        self.processes.end()

    @contextmanager
    def _at_work(self, turn: str | None) -> Iterator[None]:
        """Inside the block the adapter `turn` stands on the base, ready to train, and the time is this run's."""
        started = time.monotonic()
        self.shared.turns.use(turn)
        self.shared.base.model.train()  # another run may have failed while it answered
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started


def finished(parts: RunSetup) -> Mapping[str, Any] | None:
    """The manifest of a finished run of this recipe, base and data, if all its files are as it wrote them."""
    folder = Path(parts.recipe.train.output)
    try:
        manifest = read_json(folder / MANIFEST)
        files = dict(manifest["files"])
        ours = (folder / RECIPE).read_text(encoding="utf-8") == redacted(dump(parts.recipe))
        known = manifest["base"]["sha256"], manifest["data"]["sha256"]
        whole = RECIPE in files and all(plain_name(name) and sha256_of(folder / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if ours and whole and known == (parts.base.manifest.sha256, parts.data.report.sha256) else None


def in_a_line(error: Exception) -> str:
    """An error as people read it."""
    return str(error) if isinstance(error, QloraError) else f"{type(error).__name__}: {error}"
