"""Train the variants of a sweep: one base model, an adapter for each variant, one step of each in turn."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qlora.adapters.round_robin import RoundRobin
from qlora.distributed.processes import require_one_process
from qlora.errors import BaseModelError
from qlora.memory.malloc import keep_freed_memory
from qlora.memory.planner.memory_plan import Plan, plan_summary
from qlora.model.frozen_digest import frozen_sha256
from qlora.recipe.planning import Machine
from qlora.recipe.recipe import Recipe
from qlora.runs.kept_matrices import with_kept_matrices
from qlora.runs.resources import open_processes
from qlora.runs.setup import EncodedData, ReadData, open_base, read_data, set_activation_policies
from qlora.runs.sweep.result import SweepResult, write_result
from qlora.runs.sweep.sweep_plan import plan_sweep, refuse_oversized
from qlora.runs.sweep.variant_run import SharedBase, VariantRun
from qlora.runs.sweep.variants import Variant
from qlora.runs.train import choose_kernels
from qlora.training.run_log import Log, live_display
from qlora.training.signals import Interrupted, StopSignal, stop_signals
from qlora.utils.folder_lock import locked_folder
from qlora.utils.machine import GIB


class Rounds(Protocol):
    """Variants that are trained one group after another on the same base model."""

    def variants(self, runs: Sequence[VariantRun], shared: SharedBase) -> Sequence[Variant]:
        """The next group, given all runs so far; empty after the last one."""

    def write(self, runs: Sequence[VariantRun], out: Path, seconds: float) -> SweepResult:
        """Write and return the result of all runs."""


@dataclass(frozen=True)
class OneRound:
    """All variants at once."""

    all_variants: Sequence[Variant]

    def variants(self, runs: Sequence[VariantRun], shared: SharedBase) -> Sequence[Variant]:
        """All of them, once."""
        return [] if runs else self.all_variants

    def write(self, runs: Sequence[VariantRun], out: Path, seconds: float) -> SweepResult:
        """The table, sweep.json and the page that compares them."""
        return write_result(runs, out, seconds)


def train_together(
    variants: Sequence[Variant], out: Path, quiet: bool = False, rounds: Callable[[Recipe], Rounds] | None = None
) -> SweepResult:
    """Train all variants on one base model; a run that fails does not end the others.

    `rounds`: what trains in place of `variants`, which are then those that memory is planned for.
    QloraError for errors before the first step; Stopped after a signal, each run with an exact checkpoint.
    """
    require_one_process("sweep")
    try:
        with locked_folder(out, "--out"):
            variants = _with_kept_matrices(variants, out, quiet)
            groups = OneRound(variants) if rounds is None else rounds(variants[0].recipe)
            return _train_together(variants, groups, out, quiet)
    except Interrupted as interrupted:  # a signal that arrived while another error was being raised
        raise interrupted.error from None


def _with_kept_matrices(variants: Sequence[Variant], out: Path, quiet: bool) -> list[Variant]:
    """The variants with what `quant.keep: auto` means, which is the same for all: it is a setting of their base."""
    quant = with_kept_matrices(variants[0].recipe, out, Log(out, quiet=quiet).print).quant
    return [replace(variant, recipe=variant.recipe.model_copy(update={"quant": quant})) for variant in variants]


def _train_together(variants: Sequence[Variant], rounds: Rounds, out: Path, quiet: bool) -> SweepResult:
    started, recipe = time.monotonic(), variants[0].recipe  # what the runs share is the same in all recipes
    with stop_signals() as stop:
        log, processes = Log(out, quiet=quiet), open_processes(recipe)
        choose_kernels(recipe.train.deterministic)
        plan = plan_memory(variants, log)
        base = open_base(recipe, processes, plan, log)
        if processes.device.type == "cpu":
            keep_freed_memory()
        shared = SharedBase(base, RoundRobin(base.model), plan, cached_read_data(), log)
        runs: list[VariantRun] = []
        while group := rounds.variants(runs, shared):
            new = [VariantRun(variant, shared, quiet) for variant in group]
            _train([run for run in new if not run.load_finished()], stop)
            if any(run.stopped for run in new):
                raise stop.error("every variant has a checkpoint of its last step; the same command resumes them")
            runs += new
        return rounds.write(runs, out, time.monotonic() - started)


def plan_memory(variants: Sequence[Variant], log: Log) -> Plan | None:
    """The memory plan of the whole sweep, logged in a line; None for a model whose shapes the planner does not know."""
    try:
        plan = plan_sweep({variant.name: variant.recipe for variant in variants}, Machine.local())
    except BaseModelError as error:
        log.print(f"no memory plan: {error}")
        return None
    refuse_oversized(plan)
    values = plan.as_json()
    log.print(
        f"memory: {values['peak_bytes'] / GIB:.2f} GiB predicted of {values['gpu_bytes'] / GIB:.2f} GiB for "
        f"{len(variants)} adapters on one base model ({values['alone_bytes'] / GIB:.2f} GiB as separate runs at once), "
        f"{plan_summary(plan.largest)}"
    )
    return plan.largest


def cached_read_data() -> ReadData:
    """`read_data` that reads data shared by several variants only once."""
    cache: dict[str, EncodedData] = {}

    def read(recipe: Recipe, *arguments: object) -> EncodedData:
        key = f"{recipe.train.seed} {recipe.objective.sided_format} {recipe.data.model_dump_json()}"
        if key not in cache:
            cache[key] = read_data(recipe, *arguments)  # type: ignore[arg-type]
        return cache[key]

    return read


def _train(runs: Sequence[VariantRun], stop: StopSignal) -> None:
    """One step of each run in turn, until all have ended."""
    if not runs:
        return
    shared = runs[0].shared
    step_down = set_activation_policies(runs[0].setup)
    for run in runs:
        run.build_job(stop, step_down)
    stop.immediate = False  # from here on files are written, and a signal waits until they are complete
    shared.adapters.activate(None)
    base_sha256 = frozen_sha256(shared.base.model)
    moment_bytes = sum([run.resume() for run in runs])
    if shared.base.device.type != "cpu":  # a CPU does not raise when it runs out of memory
        for run in runs:
            run.probe_memory(moment_bytes)
    active = list(runs)
    with live_display({run.log: run.job.total_steps for run in runs}, lambda: stop.received):
        while active:
            active = [run for run in active if run.advance(base_sha256)]
