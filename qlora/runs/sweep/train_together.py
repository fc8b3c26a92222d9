"""The walk of a sweep: one base, every variant equipped on it, steps in turn, and what each run leaves."""

import time
from collections.abc import Sequence
from pathlib import Path

from qlora.adapters.round_robin import RoundRobin
from qlora.model.frozen_digest import frozen_sha256
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError, InputError
from qlora.memory.malloc import keep_freed_memory
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.memory_plan import in_words
from qlora.recipe.planning import here
from qlora.recipe.recipe import Recipe
from qlora.runs.train import ReadRows, Rows, arrange_layers, choose_kernels, open_base, read_rows
from qlora.runs.strategy import open_processes
from qlora.runs.sweep.result import Outcome, outcome_of
from qlora.runs.sweep.sweep_plan import plan_sweep, refuse_too_much
from qlora.runs.sweep.variant_run import Runner, Shared
from qlora.runs.sweep.variants import Variant
from qlora.training.signals import Interrupted, StopSignal, stop_signals
from qlora.training.run_log import Log, watching

GIB = 2**30


def train_together(variants: Sequence[Variant], out: Path, quiet: bool = False) -> Outcome:
    """Train every variant to its end on one resident base; a run that fails takes no other with it.

    QloraError for what is wrong before the first step; Stopped after a signal, each run with its exact checkpoint.
    """
    refuse_several_processes()
    try:
        return _walk(variants, out, quiet)
    except Interrupted as abandoned:  # a signal that came while another error was on its way out
        raise abandoned.error from None


def refuse_several_processes() -> None:
    """InputError under a launcher of several processes."""
    if Processes.launched() > 1:
        raise InputError(
            f"a sweep trains in one process, but the launcher started {Processes.launched()}. Start `qlora sweep` "
            "without it; for several cards, one sweep a card: CUDA_VISIBLE_DEVICES=1 qlora sweep ..."
        )


def _walk(variants: Sequence[Variant], out: Path, quiet: bool) -> Outcome:
    started, leader = time.monotonic(), variants[0].recipe
    with stop_signals() as stop:
        log, processes = Log(out, quiet=quiet), open_processes(leader)
        choose_kernels(leader.train.deterministic)
        plan = planned(variants, log)
        base = open_base(leader, processes, plan, log)
        if processes.device.type == "cpu":
            keep_freed_memory()
        shared = Shared(base, RoundRobin(base.model), plan, reading_once())
        runners = [Runner(variant, shared, quiet) for variant in variants]
        _train([runner for runner in runners if not runner.found_finished()], stop)
        if any(runner.stopped for runner in runners):
            raise stop.error("every variant has a checkpoint of its last step; the same command goes on with all")
        return outcome_of(runners, out, time.monotonic() - started)


def planned(variants: Sequence[Variant], log: Log) -> Plan | None:
    """The memory plan that all turns obey; None, said in a line, for a model whose shapes are not known."""
    try:
        found = plan_sweep({variant.name: variant.recipe for variant in variants}, here())
    except BaseModelError as error:
        log.say(f"no memory plan: {error}")
        return None
    refuse_too_much(found)
    said = found.as_json()
    log.say(
        f"memory: {said['peak_bytes'] / GIB:.2f} GiB predicted of {said['gpu_bytes'] / GIB:.2f} GiB for "
        f"{len(variants)} adapters on one base ({said['alone_bytes'] / GIB:.2f} GiB as runs of their own at once), "
        f"{in_words(found.most)}"
    )
    return found.most


def reading_once() -> ReadRows:
    """`read_rows` that reads the same data for several variants only once."""
    known: dict[str, Rows] = {}

    def read(recipe: Recipe, *rest: object) -> Rows:
        key = f"{recipe.train.seed} {recipe.data.model_dump_json()}"
        if key not in known:
            known[key] = read_rows(recipe, *rest)  # type: ignore[arg-type]
        return known[key]

    return read


def _train(runners: Sequence[Runner], stop: StopSignal) -> None:
    """A step of each in turn, until all have ended."""
    if not runners:
        return
    shared = runners[0].shared
    step_down = arrange_layers(runners[0].parts)
    for runner in runners:
        runner.assemble(stop, step_down)
    stop.at_once = False  # from here on files are written, and a signal waits until they are whole
    shared.turns.use(None)
    before = frozen_sha256(shared.base.model)
    moment_bytes = sum([runner.resume() for runner in runners])
    if shared.base.device.type == "cuda":  # a CPU does not raise when it runs out
        for runner in runners:
            runner.rehearse(moment_bytes)
    waiting = list(runners)
    with watching({runner.log: runner.job.steps for runner in runners}, lambda: stop.came):
        while waiting:
            waiting = [runner for runner in waiting if runner.turn(before)]
