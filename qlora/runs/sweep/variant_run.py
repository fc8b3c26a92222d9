"""The run of one variant of a sweep: its adapter, data, job and position on the shared base model, and its outcome."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters.round_robin import RoundRobin
from qlora.errors import QloraError, Stopped
from qlora.memory.planner.memory_plan import Plan
from qlora.model.load_base import Base
from qlora.runs.artifacts import MANIFEST, RECIPE
from qlora.runs.resources import Resources, open_processes
from qlora.runs.resume import keep_best, refuse_changed_base, resume
from qlora.runs.setup import ReadData, add_adapters_and_data, build_job, moments_due_bytes
from qlora.runs.suspect_adapter import kept_as_suspect
from qlora.runs.sweep.shared_settings import name_in_errors
from qlora.runs.sweep.variants import Variant
from qlora.runs.write_artifacts import Cost, RunSetup, samples_or_note, write_artifacts, write_weights
from qlora.training import RENAMED_OPTIMIZERS
from qlora.training.checkpoint import Position
from qlora.training.job import Job
from qlora.training.loop import passes
from qlora.training.memory_probe import probe_memory
from qlora.training.oom_recovery import StepDown
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal
from qlora.utils.atomic_files import is_bare_name, read_json, sha256_of
from qlora.utils.redact import redacted


@dataclass(frozen=True)
class SharedBase:
    """What all variants of a sweep share."""

    base: Base
    adapters: RoundRobin
    plan: Plan | None
    read: ReadData
    log: Log  # of the sweep


class VariantRun:
    """A variant with its own adapter, data order, optimizer, position and log. Errors name the variant."""

    def __init__(self, variant: Variant, shared: SharedBase, quiet: bool) -> None:
        """Add the variant's adapter to the base model and read its data."""
        self.variant, self.name, self.shared = variant, variant.name, shared
        self.folder = Path(variant.recipe.train.output)
        self.processes = open_processes(variant.recipe)
        self.log = Log(self.folder, self.processes.track, quiet=quiet, name=self.name)
        self.manifest: Mapping[str, Any] | None = None  # run.json, once the run is complete
        self.error: Exception | None = None
        self.stopped = False
        self.kept = False  # finished by an earlier sweep
        self.seconds = 0.0  # of this run's work, without that of the other variants
        self._position = Position()
        self._passes: Iterator[Position] = iter(())
        self._job: Job | None = None
        for note in variant.notes:
            self.log.print(note)
        with name_in_errors(self.name), self._active(None):
            resources = Resources(self.processes, (variant.recipe.train.micro_batch,), shared.plan)
            self.setup = add_adapters_and_data(variant.recipe, resources, shared.base, self.log, shared.read)
        shared.adapters.add(self.name)

    @property
    def job(self) -> Job:
        """The training job, between `build_job` and the end of the run."""
        assert self._job is not None
        return self._job

    def load_finished(self) -> bool:
        """Whether an earlier sweep finished the same run and its files are unchanged; its manifest is then kept."""
        self.manifest = finished_manifest(self.setup) if self.variant.recipe.train.resume == "auto" else None
        if self.manifest is None:
            return False
        self.kept = True
        self.log.print(f"finished before, kept: {self.folder}")
        self._close()
        return True

    def build_job(self, stop: StopSignal, step_down: StepDown) -> None:
        """Build the training job on layers whose activation policies are set already."""
        with name_in_errors(self.name), self._active(self.name):
            self._job = build_job(self.setup, self.log, stop, step_down)
        self.processes.start_trackers(self.folder, self.variant.recipe.model_dump(mode="json"))

    def resume(self) -> int:
        """Restore the newest checkpoint, if any; returns the bytes that the optimizer has yet to allocate."""
        with name_in_errors(self.name), self._active(self.name):
            self._position = resume(self.setup, self.job)
        self._passes = passes(self.job, self._position)
        return moments_due_bytes(self.setup, self._position)

    def probe_memory(self, moment_bytes: int) -> None:
        """Run the longest micro-batch together with the optimizer state of all variants."""
        with name_in_errors(self.name), self._active(self.name):
            probe_memory(self.job, moment_bytes)

    def advance(self, base_sha256: str) -> bool:
        """Take a step, or finish the run after the last one; False when it has ended, for any reason."""
        try:
            with self._active(self.name):
                position = next(self._passes, None)
                if position is not None:
                    self._position = position
                    return True
                self._finish(base_sha256)
        except Stopped as stopped:
            self.stopped = True
            self.log.print(str(stopped))
        except Exception as error:  # the other variants continue
            self.error = error
            self.log.print_always(f"{self.name}: error: {error_text(error)}")
        self._close()
        return False

    def _finish(self, base_sha256: str) -> None:
        with kept_as_suspect(self.setup, self._position, self.log):
            self.shared.adapters.activate(None)
            try:
                refuse_changed_base(self.setup, base_sha256)
            finally:
                self.shared.adapters.activate(self.name)
            keep_best(self.setup, self.job, self._position)
            base = self.setup.base
            self.setup.expert_loads.measure_again(base.model, self.setup.data.train, base.device)
            write_weights(self.setup)
            samples = samples_or_note(self.setup, self.log)
            self.manifest = write_artifacts(self.setup, self._position, Cost(self.seconds), samples)

    def _close(self) -> None:
        """Free what only this run needed: its adapter, optimizer state and data order."""
        self.shared.adapters.remove(self.name)
        self._job, self._passes = None, iter(())
        self.processes.end()

    @contextmanager
    def _active(self, adapter: str | None) -> Iterator[None]:
        """Inside the block `adapter` is active on the base model, in training mode, and time counts for this run."""
        started = time.monotonic()
        self.shared.adapters.activate(adapter)
        self.shared.base.model.train()  # a run that failed during an evaluation leaves it in evaluation mode
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started


def finished_manifest(setup: RunSetup) -> Mapping[str, Any] | None:
    """The manifest of a finished run with the same recipe, base model and data whose files are unchanged."""
    folder = Path(setup.recipe.train.output)
    try:
        manifest = read_json(folder / MANIFEST)
        files = dict(manifest["files"])
        recipe_text = (folder / RECIPE).read_text(encoding="utf-8")
        digests = manifest["base"]["sha256"], manifest["data"]["sha256"]
        intact = all(is_bare_name(name) and sha256_of(folder / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for old, new in RENAMED_OPTIMIZERS.items():
        recipe_text = recipe_text.replace(f"kind: {old}\n", f"kind: {new}\n")
    same_recipe = RECIPE in files and recipe_text == redacted(setup.recipe_text)
    same_digests = digests == (setup.base.manifest.sha256, setup.data.report.sha256)
    return manifest if same_recipe and same_digests and intact else None


def error_text(error: Exception) -> str:
    """The message of an error, with its type unless it is one of ours."""
    return str(error) if isinstance(error, QloraError) else f"{type(error).__name__}: {error}"
