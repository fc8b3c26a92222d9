"""The walk: recipe -> processes -> base -> adapters -> data -> fit -> save. With reopen.py, what sees every room."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora.adapters import ADAPTERS
from qlora.adapters.full import Full
from qlora.adapters.init import begin
from qlora.adapters.inject import Injection, count, inject
from qlora.adapters.lora import Lora
from qlora.adapters.modules_to_save import save
from qlora.adapters.trainable_tokens import ROWS, ids_of, train_rows
from qlora.runs.artifacts import RECIPE, Cost, RunSetup, draw_running, leave, restore_trained, samples_of, write_trained
from qlora.model.load_base import Base
from qlora.model.original_weights import matrices
from qlora.model.frozen_digest import frozen_sha256
from qlora.recipe.recommendations import recommendations
from qlora.data.data_report import DataReport
from qlora.data.prepare import Prepared, prepare
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import counted
from qlora.distributed.processes import Processes
from qlora.distributed.watchdog import Watchdog
from qlora.errors import BaseModelError, InputError, QloraError
from qlora.utils.atomic_files import write_text
from qlora.utils.atomic_folders import sweep
from qlora.memory.malloc import keep_freed_memory
from qlora.memory.energy import energy_joules
from qlora.memory.planner.breakdown import moment_bytes, moments_wait
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.memory_plan import in_words
from qlora.runs.memory_setup import MemoryFallback, arrange_unplanned, load_base
from qlora.recipe.planning import left_open, plan_run, unused_cards
from qlora.runs.micro_batches import of_size, portions_of, strategy_of
from qlora.utils.progress import ProgressReporter
from qlora.recipe.recipe import Recipe, dump
from qlora.utils.redact import redacted_values
from qlora.runs.strategy import open_processes
from qlora.training import OPTIMIZERS
from qlora.training.checkpoint_sync import agreed
from qlora.training.checkpoint import Checkpoints, Position, Saved, broken, read, refuse_changes, restore
from qlora.training.signals import Interrupted, StopSignal, stop_signals
from qlora.training.run_log import Log, watching
from qlora.training.loop import Job, fit, refuse_other_rates, rehearse, steps_of
from qlora.training.loss import TokenLoss
from qlora.training.optimizers import groups
from qlora.training.packing_probe import refuse_leaks
from qlora.training.gradient_check import watch_gradients
from qlora.training.compile import compile_layers
from qlora.training.oom_recovery import OomRecovery, StepDown

Rows = tuple[Prepared, str]  # and the sha256 of what decides which tokens a row becomes
ReadRows = Callable[[Recipe, Processes, Base, Log], Rows]

WARNINGS_SHOWN = 5  # findings printed before a run; `qlora check` prints all


def train(recipe: Recipe, notes: Sequence[str] = (), quiet: bool = False) -> Mapping[str, Any]:
    """The main job, from a recipe to a folder with an adapter; returns the run's manifest.

    QloraError if something is wrong, Stopped after a signal: in both cases with what to do next.
    """
    with Watchdog() as watch:
        try:
            return _walk(recipe, notes, quiet, watch)
        except Interrupted as abandoned:  # a signal that came while another error was on its way out
            raise abandoned.error from None


def _walk(recipe: Recipe, notes: Sequence[str], quiet: bool, watch: Watchdog) -> Mapping[str, Any]:
    """Each part after the other, all under the signals' eyes."""
    started = time.monotonic()
    manifest: Mapping[str, Any]
    with stop_signals() as stop:
        processes = open_processes(recipe)
        watch.begin()
        log = Log(Path(recipe.train.output), processes.track, quiet=quiet or not processes.is_main)
        processes.start_trackers(Path(recipe.train.output).name, recipe.model_dump(mode="json"))
        choose_kernels(recipe.train.deterministic)
        for note in (*notes, *unused_cards(processes.world)):
            log.say(note)
        portions = portions_of(recipe, processes)
        plan = planned(of_size(recipe, portions.own), processes, log)
        parts = replace(gather(recipe, processes, plan, log), sizes=portions.sizes)
        if len(set(portions.sizes)) > 1:
            log.say(str(portions))
        if processes.device.type == "cpu":
            keep_freed_memory()
        job = assemble(parts, log, stop)
        energy = energy_joules(processes.device)
        stop.at_once = False  # from here on files are written, and a signal waits until they are whole
        position = resume(parts, job)
        before = frozen_sha256(parts.base.model)  # a checkpoint brings its own of what a start keeps beside A and B
        with watching({log: job.steps}, lambda: stop.came):
            if processes.device.type == "cuda":  # a CPU does not raise when it runs out
                rehearse(job, moments_of(parts, position))
            position = fit(job, position)
        refuse_changed_base(parts, before)
        keep_best(parts, job, position)
        # Answers of a sharded model take all processes.
        samples = samples_of(parts) if processes.writes or processes.shards else []
        cost = Cost(time.monotonic() - started, spent_joules(processes, energy))
        manifest = leave(parts, position, cost, samples) if processes.writes else {}
        processes.wait()
        watch.done()
        del job  # DDP's reducer first: should the group go with it, the interpreter's lock and the group's may cross
        processes.end()
    return manifest


def choose_kernels(deterministic: bool) -> None:
    """Only kernels that give the same bits again, or any; before the first product of matrices."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS in this mode
    torch.use_deterministic_algorithms(deterministic)


def planned(recipe: Recipe, processes: Processes, log: Log) -> Plan | None:
    """The memory plan that the run obeys; None, said in a line, for a model whose shapes the planner does not know."""
    try:
        plan = plan_run(recipe, processes.world, strategy_of(processes))
    except BaseModelError as error:
        log.say(f"no memory plan: {error}")
        return None
    said, log.planned_bytes = plan.as_json(), plan.peak_bytes
    log.say(
        f"memory: {said['peak_bytes'] / 2**30:.2f} GiB predicted of {said['gpu_bytes'] / 2**30:.2f} GiB, "
        f"{in_words(plan)}"
    )
    return plan


def gather(recipe: Recipe, processes: Processes, plan: Plan | None, log: Log) -> RunSetup:
    """Base, adapters and data of a recipe, each announced in a line."""
    return equip(recipe, processes, open_base(recipe, processes, plan, log), plan, log)


def open_base(recipe: Recipe, processes: Processes, plan: Plan | None, log: Log) -> Base:
    """The base of a recipe, where its plan wants it. InputError if it can't be trained on in its dtype."""
    base = load_base(recipe, processes.device, plan, log.say, processes)
    if base.dtype == torch.float16:
        raise InputError(
            "model.dtype: float16 gradients need loss scaling, which is not built. Use bfloat16 or float32."
        )
    return base


def read_rows(recipe: Recipe, processes: Processes, base: Base, log: Log) -> Rows:
    """The data of a recipe, as the base's tokenizer reads it; said in lines, refused if it can't be trained on."""
    encoder = Encoder(base.tokenizer, recipe.data.train_on, recipe.model.chat_template)
    told = ProgressReporter(log.say if processes.is_main else log.say_anyway, "data")  # the first to come prepares for all
    data = prepare(recipe.data, encoder, recipe.train.seed, told)
    announce(data.report, log)
    data.report.refuse()
    return data, encoder.sha256


def equip(
    recipe: Recipe, processes: Processes, base: Base, plan: Plan | None, log: Log, read: ReadRows = read_rows
) -> RunSetup:
    """Adapters on a base, and data for them."""
    adapter = build_adapter(recipe)
    injected = place_adapter(recipe, adapter, base)
    log.say(f"{recipe.model.name}: {injected}")
    begun = begin(base.model, recipe.adapter.init or "default", partial(matrices, base.folder.path), recipe.train.seed)
    if begun:
        log.say(f"adapter.init {recipe.adapter.init}: {begun}")
    data, encoder_sha256 = read(recipe, processes, base, log)
    for key, message in recommendations(
        recipe, data.report, steps_of(recipe.train, len(data.train)), injected.trainable_parameters
    ):
        log.say(f"{key}: {message}")
    return RunSetup(recipe, processes, base, adapter, injected, data, plan, encoder_sha256, begun)


def announce(report: DataReport, log: Log) -> None:
    """What became of the rows: counts by reason, the first warnings, how conversations are written."""
    for note in report.notes:
        log.say(note)
    for reason, rows in report.dropped.items():
        first = next((f.where for f in (*report.problems, *report.warnings) if reason in f.message), "")
        log.say(f"dropped {counted(rows)}: {reason} (first: {first}; `qlora check --json` names each)")
    told = [finding for finding in report.warnings if not finding.message.startswith("dropped")]
    for finding in told[:WARNINGS_SHOWN]:
        log.say(f"{finding.where}: {finding.message}")
    for line in report.summary():
        log.say(line)


def build_adapter(recipe: Recipe) -> Lora | Full:
    """The adapter kind of the recipe."""
    section = recipe.adapter
    if section.kind == "full":
        return Full()
    patterns = (dict(section.rank_pattern or {}), dict(section.alpha_pattern or {}))
    return ADAPTERS[section.kind](section.rank, section.alpha, section.dropout, *patterns)  # type: ignore[no-any-return]


def place_adapter(recipe: Recipe, adapter: Lora | Full, base: Base) -> Injection:
    """Let everything train that the recipe says should."""
    model, section = base.model, recipe.adapter
    if isinstance(adapter, Full):
        return adapter.train_all(model)
    injected = inject(model, adapter, targets_of(recipe), recipe.train.seed)
    saved = save(model, section.save_modules)
    if section.tokens or section.new_tokens:
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        saved += train_rows(model, ids_of(base.tokenizer, (*section.tokens, *section.new_tokens), rows))
    return replace(count(model, injected.linear_layers), whole=tuple(saved)) if saved else injected


def targets_of(recipe: Recipe) -> str | Sequence[str]:
    """Which layers are adapted: `all-linear` unless the recipe says otherwise."""
    return recipe.adapter.targets or "all-linear"


def assemble(parts: RunSetup, log: Log, stop: StopSignal, step_down: StepDown | None = None) -> Job:
    """The loop's working set: model wrapped for its processes, optimiser, checkpoints.

    `step_down`: how a model whose layers are arranged already can do with less.
    """
    recipe, base = parts.recipe, parts.base
    step_down = step_down or arrange_layers(parts)
    if recipe.train.compile:
        compile_layers(base.model, parts.processes.device)
    loss = TokenLoss(base.model)
    apart = refuse_leaks(loss, parts.data.train, base.dtype, parts.processes.device)
    if apart is not None:
        log.say(f"packing: documents see only themselves (logits differ by {apart:.1e} standard deviations)")
    trainable = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    optim = recipe.optim
    peak_rates = groups(trainable, optim.learning_rate, optim.loraplus_ratio)
    steps = steps_of(recipe.train, len(parts.data.train))
    log.redraw = partial(draw_running, parts, steps)
    checkpoints = Checkpoints(
        Path(recipe.train.output),
        recipe.train.keep,
        lambda folder: write_trained(parts, folder, final=False),
        fixed_of(parts, steps),
    )
    optimizer = OPTIMIZERS[optim.kind].build(peak_rates, optim.betas, optim.weight_decay)
    # The row of a token that no row of these steps has learns later.
    watch_gradients(optimizer, {name: value for name, value in trainable.items() if not name.endswith(ROWS)})
    return Job(
        model=parts.processes.wrap(loss.train()),
        trainable=trainable,
        optimizer=optimizer,
        train=parts.data.train,
        held_out=parts.data.eval,
        order=recipe.data.order,
        settings=recipe.train,
        optim=optim,
        steps=steps,
        processes=parts.processes,
        sizes=parts.sizes or [recipe.train.micro_batch] * parts.processes.world,
        log=log,
        checkpoints=checkpoints,
        stop=stop,
        relief=OomRecovery(trainable.values(), step_down, log.say),
    )


def arrange_layers(parts: RunSetup) -> StepDown:
    """Let layers keep, recompute or park as planned; returns how the run can do with less of the device's memory."""
    model, device, plan = parts.base.model, parts.processes.device, parts.plan
    if plan is None:
        arrange_unplanned(model, parts.recipe, device)
        return lambda: None
    ladder = MemoryFallback(model, plan.work, left_open(parts.recipe, plan.work.shapes.layers), device)
    # The other processes would wait for this one's gradients while it repeats its step.
    return ladder.step_down if parts.processes.world == 1 else lambda: None


def moments_of(parts: RunSetup, position: Position) -> int:
    """Device memory that the optimiser takes at the first step; none once it is there, or where it can be elsewhere."""
    optimizer = parts.recipe.optim.kind
    due = position.step == 0 and not moments_wait(optimizer)
    return moment_bytes(parts.injected.trainable_parameters, optimizer) if due else 0


def refuse_changed_base(parts: RunSetup, before: str) -> None:
    """QloraError if a byte of the frozen base is not what it was before the first step."""
    if parts.processes.any(frozen_sha256(parts.base.model) != before):
        raise QloraError(
            f"{parts.recipe.model.name}: bytes of the frozen base changed during training, so the adapter is not this "
            "base's; no final one was written. Is memory faulty? A library that changes weights is a defect: tell us."
        )


def fixed_of(parts: RunSetup, steps: int) -> dict[str, Any]:
    """What may not change between two parts of a run: all that alters the mathematics."""
    recipe = parts.recipe
    sections = {"quant": recipe.quant, "adapter": recipe.adapter, "optim": recipe.optim}
    keys = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.model_dump(mode="json").items()
    }
    # The schedule may be stretched as long as the steps already taken keep their rate; it is compared by value.
    for free in ("optim.schedule", "optim.warmup"):
        del keys[free]
    rows = recipe.data.model_dump(mode="json", exclude={"train", "eval"})
    keys |= {f"data.{key}": value for key, value in rows.items()}
    keys["train.seed"], keys["train.global_batch"] = recipe.train.seed, recipe.train.global_batch
    if parts.adapter.dropout:  # its masks are drawn a micro-batch and a process at a time
        keys["train.micro_batch"], keys["processes"] = recipe.train.micro_batch, parts.processes.world
        if len(set(parts.sizes)) > 1:
            keys["micro-batches of the processes"] = list(parts.sizes)
    keys["model.dtype"] = parts.base.manifest.dtype
    keys["base sha256"], keys["data sha256"] = parts.base.manifest.sha256, parts.data.report.sha256
    keys["tokenizer and template sha256"] = parts.encoder_sha256
    return dict(redacted_values(keys))  # as the checkpoint's file has them


def resume(parts: RunSetup, job: Job) -> Position:
    """Where the run starts: at a checkpoint that verifies and belongs to this recipe, else at step 0."""
    output = Path(parts.recipe.train.output)
    if parts.processes.writes:
        sweep(output)
    saved, skipped = find_here(parts, job)
    for line in skipped:
        job.log.say(line)
    position = Position()
    with agreed(parts.processes, saved) as saved:
        aside = job.checkpoints.set_aside() if parts.processes.writes and not saved else None
        if aside:
            job.log.say(f"a new run starts here; the checkpoints that were there are in {aside}")
        if saved:
            refuse_changes(saved, job.checkpoints.fixed)
            refuse_other_rates(saved, job.optim, job.steps)
            position = restore(saved, partial(restore_trained, parts), job.optimizer, job.trainable)
            job.log.say(f"resumed from {saved.folder} at step {position.step} of {job.steps}")
    if parts.processes.writes:
        job.log.restart(position.step, position.evaluated_step == position.step)
        write_text(output / RECIPE, dump(parts.recipe))
    parts.processes.wait()
    return position


def spent_joules(processes: Processes, before: float | None) -> float | None:
    """What all cards have taken since `before`; None where one does not tell."""
    now = energy_joules(processes.device)
    spent = math.nan if before is None or now is None else now - before
    total = float(processes.sum(torch.tensor(spent, dtype=torch.float64, device=processes.device)))
    return round(total, 1) if math.isfinite(total) else None


def keep_best(parts: RunSetup, job: Job, position: Position) -> None:
    """With early stopping the adapter that is left is the best one, not the last one."""
    best = position.best_step
    if parts.recipe.train.early_stop is None or best is None or best == position.step:
        return
    folder = job.checkpoints.folder_of(best)
    if broken(folder) is None:
        restore_trained(parts, folder)
        job.log.say(f"the adapter of step {best} is kept: its held-out loss {position.best_loss:.4f} is the lowest")


def find_here(parts: RunSetup, job: Job) -> tuple[Saved | None, list[str]]:
    """The checkpoint to go on from, on this machine's disk; only the first process's has to be there."""
    try:
        return find_saved(parts.recipe.train.resume, job.checkpoints)
    except InputError:
        if parts.processes.is_main:
            raise
        return None, []


def find_saved(wanted: str, checkpoints: Checkpoints) -> tuple[Saved | None, list[str]]:
    """The checkpoint that `train.resume` means, and a line for each that was passed over."""
    if wanted == "never":
        return None, []
    return checkpoints.newest() if wanted == "auto" else (read(Path(wanted)), [])
