"""`qlora train`: resources, base model, adapters, data, training, artifacts."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora.distributed.processes import Processes
from qlora.distributed.watchdog import Watchdog
from qlora.memory.energy import energy_joules
from qlora.memory.malloc import keep_freed_memory
from qlora.model.frozen_digest import frozen_sha256
from qlora.recipe.recipe import Recipe
from qlora.runs.kept_matrices import with_kept_matrices
from qlora.runs.resources import Resources, resolve_resources
from qlora.runs.resume import keep_best, refuse_changed_base, resume
from qlora.runs.setup import build_job, moments_due_bytes, set_up
from qlora.runs.suspect_adapter import kept_as_suspect
from qlora.runs.write_artifacts import Cost, samples_or_note, write_artifacts, write_weights
from qlora.training.loop import fit
from qlora.training.memory_probe import probe_memory
from qlora.training.run_log import Log, console, live_display
from qlora.training.signals import Interrupted, StopSignal, stop_signals
from qlora.utils.folder_lock import locked_folder


def train(recipe: Recipe, notes: Sequence[str] = (), quiet: bool = False) -> Mapping[str, Any]:
    """Train a recipe; returns the run's manifest. The run folder then holds the adapter and everything about it.

    QloraError if something is wrong, Stopped after a signal: both messages say what to do next.
    """
    with Watchdog() as watchdog:
        try:
            with stop_signals() as stop:
                return _train(recipe, notes, quiet, watchdog, stop)
        except Interrupted as interrupted:  # a signal that arrived while another error was being raised
            raise interrupted.error from None


def _train(
    recipe: Recipe, notes: Sequence[str], quiet: bool, watchdog: Watchdog, stop: StopSignal
) -> Mapping[str, Any]:
    """The processes and their log; then, if no other process trains in the run folder, the run."""
    started = time.monotonic()
    progress = (lambda line: None) if quiet else partial(console().print, markup=False)
    recipe = with_kept_matrices(recipe, Path(recipe.train.output), progress)
    resources = resolve_resources(recipe, watchdog.start)
    writes = resources.processes.writes
    with locked_folder(Path(recipe.train.output), "train.output") if writes else nullcontext():
        log = _open_log(recipe, resources, notes, quiet)
        manifest = _run(recipe, resources, log, stop, started)
    # The job with DDP's reducer is freed by now: freed together with the process group, the two can deadlock.
    watchdog.stop()
    resources.processes.end()
    return manifest


def _run(recipe: Recipe, resources: Resources, log: Log, stop: StopSignal, started: float) -> Mapping[str, Any]:
    """The whole program: what is set up, the loop, what is written."""
    processes = resources.processes
    resources.require_fit()
    choose_kernels(recipe.train.deterministic)
    setup = set_up(recipe, resources, log)
    if processes.device.type == "cpu":
        keep_freed_memory()
    job = build_job(setup, log, stop)
    joules_before = energy_joules(processes.device)
    stop.immediate = False  # from here on files are written, and a signal waits until they are complete
    position = resume(setup, job)
    base_sha256 = frozen_sha256(setup.base.model)  # after resume: a checkpoint brings its own frozen A0 and B0
    with live_display({log: job.total_steps}, lambda: stop.received):
        if processes.device.type != "cpu":  # a CPU does not raise when it runs out of memory
            probe_memory(job, moments_due_bytes(setup, position))
        position = fit(job, position)
    with kept_as_suspect(setup, position, log):
        refuse_changed_base(setup, base_sha256)
        keep_best(setup, job, position)
        setup.expert_loads.measure_again(setup.base.model, setup.data.train, processes.device)
        if processes.writes:
            write_weights(setup)
        # Generating with a sharded model takes all ranks.
        samples = samples_or_note(setup, log) if processes.writes or processes.shards else []
        cost = Cost(time.monotonic() - started, spent_joules(processes, joules_before))
        manifest = write_artifacts(setup, position, cost, samples) if processes.writes else {}
    processes.barrier()
    return manifest


def _open_log(recipe: Recipe, resources: Resources, notes: Sequence[str], quiet: bool) -> Log:
    """The run's log and trackers, with what a user should read before anything is loaded."""
    processes, output = resources.processes, Path(recipe.train.output)
    log = Log(output, processes.track, quiet=quiet or not processes.is_main)
    viewers = processes.start_trackers(output, recipe.model_dump(mode="json"))
    for note in (*notes, *resources.notes, *(f"to look at this run: {viewer}" for viewer in viewers)):
        log.print(note)
    if resources.plan is not None:
        log.planned_bytes = resources.plan.peak_bytes
    return log


def choose_kernels(deterministic: bool) -> None:
    """Allow only kernels that give the same bits again, or any; before the first matmul."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS in this mode
    torch.use_deterministic_algorithms(deterministic)
    # Every tensor is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def spent_joules(processes: Processes, before: float | None) -> float | None:
    """The energy that all GPUs have used since `before`; None where one does not report it."""
    now = energy_joules(processes.device)
    spent = math.nan if before is None or now is None else now - before
    total = float(processes.sum_counts(torch.tensor(spent, dtype=torch.float64)))
    return round(total, 1) if math.isfinite(total) else None
