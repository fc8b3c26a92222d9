"""Where a run starts, what may not change between its parts, and which checkpoint it ends with."""

from functools import partial
from pathlib import Path
from typing import Any

from qlora.adapters.adapter_folder import WEIGHTS
from qlora.errors import InputError, QloraError
from qlora.model.frozen_digest import frozen_sha256
from qlora.recipe.recipe import Recipe
from qlora.runs.artifacts import RECIPE
from qlora.runs.write_artifacts import RunSetup, restore_trained
from qlora.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    Position,
    read,
    refuse_changes,
    refuse_other_rates,
    restore,
)
from qlora.training.checkpoint_folder import find_damage
from qlora.training.checkpoint_sync import sync_checkpoint
from qlora.training.job import Job
from qlora.utils.atomic_files import sha256_of, write_text
from qlora.utils.atomic_folders import remove_leftovers
from qlora.utils.redact import redacted_values


def resume(setup: RunSetup, job: Job) -> Position:
    """Where the run starts: at a checkpoint that verifies and belongs to this recipe, else at step 0."""
    output = Path(setup.recipe.train.output)
    if setup.processes.writes:
        remove_leftovers(output)
    saved, skipped = _find_local(setup, job)
    for line in skipped:
        job.log.print(line)
    position = Position()
    with sync_checkpoint(setup.processes, saved) as saved:
        old_checkpoints = job.checkpoints.archive() if setup.processes.writes and not saved else None
        if old_checkpoints:
            job.log.print(f"a new run starts here; earlier checkpoints were moved to {old_checkpoints}")
        if saved:
            refuse_changes(saved, job.checkpoints.fixed)
            refuse_other_rates(saved, job.optim, job.total_steps)
            position = restore(saved, partial(restore_trained, setup), job.optimizer, job.trainable)
            job.log.print(f"resumed from {saved.folder} at step {position.step} of {job.total_steps}")
    if setup.processes.writes:
        job.log.truncate(position.step, position.evaluated_step == position.step)
        write_text(output / RECIPE, setup.recipe_text)
    setup.processes.barrier()
    return position


def _find_local(setup: RunSetup, job: Job) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from on this machine's disk; only rank 0's has to be there."""
    try:
        return find_saved(setup.recipe.train.resume, job.checkpoints)
    except InputError:
        if setup.processes.is_main:
            raise
        return None, []


def find_saved(setting: str, checkpoints: Checkpoints) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `train.resume` names, and a line for each one that was skipped."""
    if setting == "never":
        return None, []
    return checkpoints.newest() if setting == "auto" else (read(Path(setting)), [])


def unchangeable_settings(setup: RunSetup, steps: int) -> dict[str, Any]:
    """What may not change between two parts of a run: all that alters the mathematics."""
    recipe = setup.recipe
    sections = {"quant": recipe.quant, "adapter": recipe.adapter, "optim": recipe.optim}
    settings = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.model_dump(mode="json").items()
    }
    del settings["quant.keep_bytes"]  # the choice within it is `quant.keep`
    if not settings["quant.keep"]:  # runs of older versions have no such setting
        del settings["quant.keep"]
    # The schedule may be stretched as long as the steps already taken keep their rate; rates are compared by value.
    for key in ("optim.schedule", "optim.warmup"):
        del settings[key]
    settings |= _objective_settings(recipe)
    data = recipe.data.model_dump(mode="json", exclude={"train", "eval"})
    settings |= {f"data.{key}": value for key, value in data.items()}
    settings["train.seed"], settings["train.global_batch"] = recipe.train.seed, recipe.train.global_batch
    if setup.adapter.dropout:  # masks are drawn for each micro-batch and rank
        micro_batches = setup.resources.micro_batches
        settings["train.micro_batch"], settings["processes"] = recipe.train.micro_batch, setup.processes.world_size
        if len(set(micro_batches)) > 1:
            settings["micro-batches of the processes"] = list(micro_batches)
    settings["model.dtype"] = setup.base.manifest.dtype
    settings["base sha256"], settings["data sha256"] = setup.base.manifest.sha256, setup.data.report.sha256
    settings["tokenizer and template sha256"] = setup.encoder.sha256
    return dict(redacted_values(settings))  # as they are in the checkpoint's file


def _objective_settings(recipe: Recipe) -> dict[str, Any]:
    """Those of an objective that compares answers, with the digest of a reference; none for supervised training."""
    if recipe.objective.sided_format is None:
        return {}
    values = recipe.objective.model_dump(mode="json", exclude={"reference"})
    settings = {f"objective.{key}": value for key, value in values.items() if value is not None}
    reference = Path(recipe.objective.reference).expanduser() / WEIGHTS
    return settings | {"objective.reference sha256": sha256_of(reference) if reference.is_file() else None}


def refuse_changed_base(setup: RunSetup, before: str) -> None:
    """QloraError if a byte of the frozen base model is not what it was before the first step."""
    if setup.processes.any(frozen_sha256(setup.base.model) != before):
        raise QloraError(
            f"{setup.recipe.model.name}: bytes of the frozen base model changed during training, so the adapter does "
            "not belong to it; the run is not finished. Check the memory of this machine; if it is not faulty, a "
            "library changed the weights: please report it."
        )


def keep_best(setup: RunSetup, job: Job, position: Position) -> None:
    """With early stopping, restore the best adapter, so that the run ends with it and not with the last one."""
    best = position.best_step
    if setup.recipe.train.early_stop is None or best is None or best == position.step:
        return
    folder = job.checkpoints.folder_of(best)
    if find_damage(folder) is None:
        restore_trained(setup, folder)
        value = f"held-out loss {position.best_loss:.4f} is the lowest"
        if position.best_accuracy is not None:
            value = f"held-out accuracy {position.best_accuracy:.1%} is the highest"
        job.log.print(f"the adapter of step {best} is kept: its {value}")
