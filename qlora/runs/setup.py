"""What is set up before the first step: base model, adapters, data, and the training loop's job."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qlora.adapters.init import initialize
from qlora.adapters.trainable_tokens import PARAMETER_SUFFIX
from qlora.data.data_report import DataReport
from qlora.data.prepare import Prepared, prepare
from qlora.data.remedies import with_remedy
from qlora.data.types import count_of
from qlora.distributed.processes import Processes
from qlora.errors import InputError
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.optimizer_state import UNPAGED_VALUES, moment_bytes, moments_leave_device
from qlora.model.lm_head import shares_prefixes
from qlora.model.load_base import Base
from qlora.model.original_weights import iter_weights
from qlora.model.rotary import describe_lengths
from qlora.recipe.dataset_profile import build_encoder
from qlora.recipe.literature import suggest_rate
from qlora.recipe.matrix_rows import position_limit, refuse_ids_without_row, refuse_long_documents
from qlora.recipe.planning import user_choices
from qlora.recipe.recipe import Recipe
from qlora.recipe.recommendations import recommend_settings
from qlora.runs.adapter_setup import add_adapter, build_adapter
from qlora.runs.memory_setup import MemoryFallback, arrange_unplanned, load_base
from qlora.runs.objective_setup import build_comparison, compared_examples, loss_module, refuse_other_reference
from qlora.runs.reference_cache import with_references
from qlora.runs.resources import Resources
from qlora.runs.resume import unchangeable_settings
from qlora.runs.sample_prompts import prompt_answerer
from qlora.runs.trained_template import TrainedEncoder
from qlora.runs.write_artifacts import RunSetup, write_running_report, write_trained
from qlora.training import OPTIMIZERS
from qlora.training.checkpoint import Checkpoints, Position
from qlora.training.compile import compile_layers
from qlora.training.expert_gradients import watch_experts
from qlora.training.expert_load import ExpertLoads, measure_loads
from qlora.training.expert_probe import refuse_wrong_columns
from qlora.training.gradient_check import watch_gradients
from qlora.training.job import Job
from qlora.training.live_panel import progress_bar
from qlora.training.loss import TokenLoss
from qlora.training.oom_recovery import OomRecovery, StepDown
from qlora.training.optimizers import parameter_groups
from qlora.training.overflow_map import choose_products
from qlora.training.packing_probe import refuse_leaks, refuse_tree_leaks
from qlora.training.run_log import Log
from qlora.training.schedule import count_steps
from qlora.training.signals import StopSignal

EncodedData = tuple[Prepared, TrainedEncoder]
ReadData = Callable[[Recipe, Processes, Base, Log], EncodedData]

WARNINGS_SHOWN = 5  # findings printed before a run; `qlora check` prints all


def set_up(recipe: Recipe, resources: Resources, log: Log) -> RunSetup:
    """Base model, adapters and data of a recipe, each announced in a line."""
    base = open_base(recipe, resources.processes, resources.plan, log)
    return add_adapters_and_data(recipe, resources, base, log)


def open_base(recipe: Recipe, processes: Processes, plan: Plan | None, log: Log) -> Base:
    """The base model, placed as planned. InputError if it can't be trained on in its dtype.

    AdapterError, before a weight is loaded, if the objective's reference is of another base.
    """
    refuse_other_reference(recipe)
    base = load_base(recipe, processes.device, plan, log.print, processes)
    if base.dtype == torch.float16 and recipe.adapter.kind == "full":
        raise InputError(
            "model.dtype: float16 is for the products of frozen matrices, and adapter.kind: full has none. Use "
            "float32, or a GPU with bfloat16."
        )
    if base.dtype == torch.float16 and recipe.model.dtype == "auto":
        log.print("model.dtype auto: float16, since this GPU has no bfloat16 (compute capability below 8.0)")
    return base


def read_data(recipe: Recipe, processes: Processes, base: Base, log: Log) -> EncodedData:
    """The tokenized data of a recipe. DataError if it can't be trained on."""
    encoder = build_encoder(recipe, base.tokenizer)
    # The first rank to arrive prepares for all, so every rank may print progress.
    shares, sided_format = shares_prefixes(base.model), recipe.objective.sided_format
    print_line = log.print if processes.is_main else log.print_always
    with progress_bar(log.console, "data", print_line) as progress:
        data = prepare(recipe.data, encoder, recipe.train.seed, progress, shares, sided_format)
    log_report(data.report, log)
    data.report.raise_for_problems()
    refuse_ids_without_row(data, base.tokenizer, len(base.model.get_input_embeddings().weight))  # type: ignore[operator]
    refuse_long_documents(data, position_limit(base.model))
    note = describe_lengths(base.model, recipe.data.max_length)
    if note:
        log.print(note)
    return data, TrainedEncoder.of(encoder)


def add_adapters_and_data(
    recipe: Recipe, resources: Resources, base: Base, log: Log, read: ReadData = read_data
) -> RunSetup:
    """Adapters on a base model, and data for them."""
    adapter = build_adapter(recipe, base.model)
    injection = add_adapter(recipe, adapter, base)
    log.print(f"{recipe.model.name}: {injection}")
    init = recipe.adapter.init or "default"
    init_result = initialize(base.model, init, partial(iter_weights, base.folder.path), recipe.train.seed)
    if init_result:
        log.print(f"adapter.init {init}: {init_result}")
    data, encoder = read(recipe, resources.processes, base, log)
    steps = count_steps(recipe.train, len(data.train))
    counts = steps, injection.trainable_parameters
    for key, message in recommend_settings(recipe, data.report, *counts, suggest_rate(recipe)):
        log.print(f"{key}: {message}")
    overflow_map = None
    if base.dtype == torch.float16:
        overflow_map = choose_products(TokenLoss(base.model), data.train, resources.processes)
        log.print(str(overflow_map))
    loads = ExpertLoads(*measure_loads(base.model, data.train, base.device))
    if loads.before:
        log.print(str(loads))
    return RunSetup(recipe, resources, base, adapter, injection, data, encoder, init_result, overflow_map, loads)


def log_report(report: DataReport, log: Log) -> None:
    """Log what was read: records dropped by reason, the first warnings, how conversations are rendered."""
    for note in report.notes:
        log.print(note)
    for reason, records in report.dropped.items():
        findings = (*report.problems, *report.warnings)
        first = next((f.where for f in findings if f.message.startswith(f"dropped, {reason}")), "")
        text = with_remedy(reason, "")
        log.print(f"dropped {count_of(records)}: {text} (first: {first}; `qlora check --json` names each)")
    warnings = [finding for finding in report.warnings if not finding.message.startswith("dropped")]
    for finding in warnings[:WARNINGS_SHOWN]:
        log.print(f"{finding.where}: {finding.message}")
    for line in report.summary():
        log.print(line)


def build_job(setup: RunSetup, log: Log, stop: StopSignal, step_down: StepDown | None = None) -> Job:
    """The training loop's job: the model wrapped for its ranks, optimizer, checkpoints.

    `step_down`: how a model whose activation policies are set already can use less memory.
    """
    recipe, model, processes = setup.recipe, setup.base.model, setup.processes
    step_down = step_down or set_activation_policies(setup)
    if recipe.train.compile:
        compile_layers(model, processes.device)
    loss = loss_module(recipe, setup.base)
    comparison = build_comparison(recipe, setup.base, loss, log.print)
    _run_probes(setup, loss, comparison is None or comparison.in_one_row, log)
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    steps = count_steps(recipe.train, len(setup.data.train))
    log.redraw_report = partial(write_running_report, setup, steps)
    job = Job(
        model=processes.wrap(loss.train()),
        trainable=trainable,
        optimizer=_build_optimizer(setup, trainable, log),
        train_examples=compared_examples(recipe, setup.data.train, comparison),
        eval_examples=compared_examples(recipe, setup.data.eval, comparison),
        data_order=recipe.data.order,
        settings=recipe.train,
        optim=recipe.optim,
        total_steps=steps,
        processes=processes,
        micro_batch_sizes=setup.resources.micro_batches,
        log=log,
        checkpoints=_checkpoints(setup, steps),
        stop_signal=stop,
        oom_recovery=OomRecovery(trainable.values(), step_down, log.print),
        scales_loss=setup.base.dtype == torch.float16,
        comparison=comparison,
        answer_prompts=prompt_answerer(recipe, setup.base, log.print, stop),
    )
    return with_references(setup, job)


def _run_probes(setup: RunSetup, loss: TokenLoss, in_rows: bool, log: Log) -> None:
    """Prove on the model that documents, answers and experts are what they should be; each in a line.

    in_rows: whether a micro-batch can have two documents in a sequence. DataError or QloraError if a proof fails.
    """
    sequences, dtype, device = setup.data.train, setup.base.dtype, setup.processes.device
    isolation_error = refuse_leaks(loss, sequences if in_rows else (), dtype, device)
    if isolation_error is not None:
        log.print(
            f"packing: documents see only themselves (logits differ by {isolation_error:.1e} standard deviations)"
        )
    tree_error = refuse_tree_leaks(loss, sequences, dtype, device)
    if tree_error is not None:
        log.print(f"prefix trees: each answer sees its own context (logits differ by {tree_error:.1e})")
    column_error = refuse_wrong_columns(setup.base.model)
    if column_error is not None:
        log.print(f"experts: each computes the update of its own columns in PEFT's file (to {column_error:.1e})")


def _build_optimizer(setup: RunSetup, trainable: dict[str, nn.Parameter], log: Log) -> torch.optim.Optimizer:
    optim = setup.recipe.optim
    groups = parameter_groups(trainable, optim.learning_rate, optim.loraplus_ratio)
    optimizer: torch.optim.Optimizer = OPTIMIZERS[optim.kind].build(groups, optim.betas, optim.weight_decay)
    # A trainable token that occurs in no sequence of these steps has no gradient yet.
    watch_gradients(
        optimizer, {name: value for name, value in trainable.items() if not name.endswith(PARAMETER_SUFFIX)}
    )
    watch_experts(optimizer, setup.base.model, setup.processes.world_size == 1, log.print)
    return optimizer


def _checkpoints(setup: RunSetup, steps: int) -> Checkpoints:
    train = setup.recipe.train
    write = partial(write_trained, setup, final=False)
    return Checkpoints(Path(train.output), train.keep, write, unchangeable_settings(setup, steps))


def set_activation_policies(setup: RunSetup) -> StepDown:
    """Let layers keep, recompute or offload as planned; returns how the run can use less of the device's memory."""
    model, processes, plan = setup.base.model, setup.processes, setup.resources.plan
    if plan is None:
        arrange_unplanned(model, setup.recipe, processes.device)
        return lambda: None
    choices = user_choices(setup.recipe, plan.work.shapes.layers)
    fallback = MemoryFallback(model, plan.work, choices, processes.device)
    # The other ranks would wait for this one's gradients while it repeats its step.
    return fallback.step_down if processes.world_size == 1 else lambda: None


def moments_due_bytes(setup: RunSetup, position: Position) -> int:
    """Device memory that the optimizer allocates at the first step; 0 after it. What can be on the host is left out."""
    optimizer = setup.recipe.optim.kind
    sizes = [value.numel() for value in setup.base.model.parameters() if value.requires_grad]
    if moments_leave_device(optimizer):
        sizes = [size for size in sizes if optimizer.startswith("paged") and size < UNPAGED_VALUES]
    return moment_bytes(sum(sizes), optimizer) if position.step == 0 else 0
