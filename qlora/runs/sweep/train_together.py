"""Train the variants of a sweep: one base model, an adapter for each variant, one step of each in turn."""

import time
from collections.abc import Sequence
from pathlib import Path

from qlora.adapters.round_robin import RoundRobin
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError, InputError
from qlora.memory.malloc import keep_freed_memory
from qlora.memory.planner.memory_plan import Plan, plan_summary
from qlora.model.frozen_digest import frozen_sha256
from qlora.recipe.planning import Machine
from qlora.recipe.recipe import Recipe
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


def train_together(variants: Sequence[Variant], out: Path, quiet: bool = False) -> SweepResult:
    """Train all variants on one base model; a run that fails does not end the others.

    QloraError for errors before the first step; Stopped after a signal, each run with an exact checkpoint.
    """
    refuse_several_processes()
    try:
        with locked_folder(out, "--out"):
            return _train_together(variants, out, quiet)
    except Interrupted as interrupted:  # a signal that arrived while another error was being raised
        raise interrupted.error from None


def refuse_several_processes() -> None:
    """InputError under a launcher of several processes."""
    world_size = Processes.launched_world_size()
    if world_size > 1:
        raise InputError(
            f"a sweep trains in one process, but the launcher started {world_size}. Start `qlora sweep` without a "
            "launcher; for several GPUs, one sweep per GPU: CUDA_VISIBLE_DEVICES=1 qlora sweep ..."
        )


def _train_together(variants: Sequence[Variant], out: Path, quiet: bool) -> SweepResult:
    started, recipe = time.monotonic(), variants[0].recipe  # what the runs share is the same in all recipes
    with stop_signals() as stop:
        log, processes = Log(out, quiet=quiet), open_processes(recipe)
        choose_kernels(recipe.train.deterministic)
        plan = plan_memory(variants, log)
        base = open_base(recipe, processes, plan, log)
        if processes.device.type == "cpu":
            keep_freed_memory()
        shared = SharedBase(base, RoundRobin(base.model), plan, cached_read_data())
        runs = [VariantRun(variant, shared, quiet) for variant in variants]
        _train([run for run in runs if not run.load_finished()], stop)
        if any(run.stopped for run in runs):
            raise stop.error("every variant has a checkpoint of its last step; the same command resumes them")
        return write_result(runs, out, time.monotonic() - started)


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
