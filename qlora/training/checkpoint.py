"""Checkpoints: an adapter folder with optimizer state and position, written atomically and verified before a resume.

`checkpoint-000200/` holds the adapter in PEFT's format, `optimizer.safetensors`, `position.json`, and `manifest.json`,
whose `files` maps every other file to its sha256. Only safetensors and JSON are read: resuming executes no code.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from qlora.adapters import peft_files
from qlora.errors import AdapterError, InputError, QloraError
from qlora.training import RENAMED_OPTIMIZERS, Optim
from qlora.training.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    POSITION,
    checkpoints_in,
    find_damage,
    step_of,
)
from qlora.training.loss_scale import INITIAL, LossScale
from qlora.training.optimizers import load_state, state_tensors
from qlora.training.schedule import rates_sha256
from qlora.utils.atomic_files import read_json, sha256_manifest, sha256_of, write_bytes, write_json
from qlora.utils.atomic_folders import atomic_folder, remove

# Entries that old checkpoints lack.
NEW_ENTRIES: Mapping[str, Any] = {
    "overflow_steps": 0,
    "loss_scale": INITIAL,
    "finite_steps": 0,
    "open_sums": {},
    "best_accuracy": None,
}
ARCHIVE = "earlier-"  # name prefix of a folder with the checkpoints of an earlier run


@dataclass(frozen=True)
class Position:
    """The state of a run between two optimizer steps, apart from weights and optimizer state."""

    step: int = 0  # optimizer steps taken
    loss: float | None = None  # of the last logged line
    eval_loss: float | None = None  # of the last evaluation
    evaluated_step: int | None = None  # step of the last evaluation
    skipped_steps: int = 0  # steps without a finite loss and gradient
    overflow_steps: int = 0  # of these, the ones whose gradients overflowed by the loss scale alone
    loss_scale: float = INITIAL  # of the next step, where products are in float16
    finite_steps: int = 0  # since the loss scale changed
    open_loss: float = 0.0  # summed over the steps since the last logged line
    open_trained_tokens: int = 0
    open_sums: dict[str, float] = field(default_factory=dict)  # of an objective that compares answers
    best_loss: float | None = None  # evaluation loss of the best step
    best_accuracy: float | None = None  # its held-out accuracy, where that decides
    best_step: int | None = None
    evaluations_since_best: int = 0
    rates_sha256: str = ""  # digest of the learning rates of all steps taken

    @property
    def scale(self) -> LossScale:
        """The loss scale of the next step, where products are in float16."""
        return LossScale(self.loss_scale, self.finite_steps)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files were verified."""

    folder: Path
    position: Position
    fixed: Mapping[str, Any]  # settings and digests that must be the same when the run resumes

    @property
    def manifest_sha256(self) -> str:
        """Identifies the content: equal for two checkpoints whose files have the same bytes."""
        return sha256_of(self.folder / MANIFEST)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self, output: Path, keep: int, write_weights: Callable[[Path], None], fixed: Mapping[str, Any]
    ) -> None:
        self.output, self.keep, self.write_weights, self.fixed = output, keep, write_weights, fixed

    def save(
        self, position: Position, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> Path:
        """Write `checkpoint-{step}` atomically, then delete the oldest beyond `keep`; the best one is always kept.

        QloraError if writing fails or a value is not finite; earlier checkpoints are then unchanged.
        """
        folder = self.folder_of(position.step)
        with atomic_folder(folder) as staging:
            self.write_weights(staging)
            state = state_tensors(optimizer, parameters)
            peft_files.refuse_non_finite(state, folder / OPTIMIZER)
            write_bytes(staging / OPTIMIZER, peft_files.serialize(state))
            write_json(staging / POSITION, {**asdict(position), "fixed": dict(self.fixed)})
            write_json(staging / MANIFEST, {"format": FORMAT, "step": position.step, "files": sha256_manifest(staging)})
        self._prune(position)
        return folder

    def folder_of(self, step: int) -> Path:
        """The path of the checkpoint of a step, whether it exists or not."""
        return self.output / f"checkpoint-{step:06d}"

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest intact checkpoint, and a message for each newer one that is damaged."""
        skipped: list[str] = []
        for folder in reversed(checkpoints_in(self.output)):
            try:
                return read(folder), skipped
            except InputError as error:
                skipped.append(f"skipped {error}")
        return None, skipped

    def archive(self) -> Path | None:
        """Move the checkpoints of an earlier run to a folder `earlier-N`, and return it. None if there are none."""
        folders = checkpoints_in(self.output)
        if not folders:
            return None
        number = 1 + sum(path.name.startswith(ARCHIVE) for path in self.output.iterdir())
        target = self.output / f"{ARCHIVE}{number}"
        target.mkdir()
        for folder in folders:
            folder.rename(target / folder.name)
        return target

    def _prune(self, position: Position) -> None:
        folders = checkpoints_in(self.output)
        kept = {step_of(folder) for folder in folders[-self.keep :]} | {position.best_step, position.step}
        for folder in folders:
            if step_of(folder) not in kept and find_damage(folder) is None:
                remove(folder)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, every file checked against the manifest. InputError if one does not match."""
    reason = find_damage(folder)
    if reason:
        raise InputError(
            f"{folder}: {reason}. Resume from an older checkpoint, or start a new run with train.resume=never."
        )
    try:
        values = read_json(folder / POSITION)
        fixed = dict(values.pop("fixed"))
        if fixed.get("optim.kind") in RENAMED_OPTIMIZERS:
            fixed["optim.kind"] = RENAMED_OPTIMIZERS[fixed["optim.kind"]]
        return Checkpoint(folder, position_of(values), fixed)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / POSITION}: holds no valid position ({error}). Resume from an older checkpoint."
        ) from error


def position_of(values: Mapping[str, Any]) -> Position:
    """A position from JSON values. ValueError or TypeError, naming the entry, if one has the wrong type or range."""
    values = {**NEW_ENTRIES, **values}
    for name, kind in get_type_hints(Position).items():
        value = values[name]
        valid = _are_sums(value) if name == "open_sums" else isinstance(value, kind) and not isinstance(value, bool)
        if isinstance(value, int | float):
            valid = valid and (math.isfinite(value) if isinstance(value, float) else 0 <= value < 2**53)
        if not valid:
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    return Position(**values)


def _are_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, float) and math.isfinite(item) for item in value.values())


def restore(
    checkpoint: Checkpoint,
    restore_weights: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> Position:
    """Restore weights (by `restore_weights`) and optimizer state; returns the position to continue from."""
    restore_weights(checkpoint.folder)
    load_state(optimizer, parameters, _tensors(checkpoint.folder / OPTIMIZER))
    return checkpoint.position


def restore_adapter(folder: Path, model: nn.Module) -> None:
    """Restore the adapters of `model` from a checkpoint. AdapterError if it has other layers or another rank."""
    values, parameters = peft_files.read_tensors(folder / peft_files.WEIGHTS), peft_files.tensors(model)
    if values.keys() != parameters.keys() or any(values[key].shape != parameters[key].shape for key in parameters):
        raise AdapterError(
            f"{folder}: its adapter has other layers or another rank than the recipe specifies. "
            "Restore adapter.targets and adapter.rank, or start a new run with train.resume=never."
        )
    peft_files.load_tensors(model, values)


def refuse_changes(checkpoint: Checkpoint, fixed: Mapping[str, Any]) -> None:
    """InputError, naming the keys, if settings or data that affect the result differ from the checkpoint's."""
    before = checkpoint.fixed
    changed = sorted(key for key in fixed.keys() | before.keys() if fixed.get(key) != before.get(key))
    if changed:
        values = {key: (_short(before.get(key)), _short(fixed.get(key))) for key in changed[:4]}
        changes = ", ".join(f"{key} (was {old}, is {new})" for key, (old, new) in values.items())
        raise InputError(
            f"{checkpoint.folder}: the run was started with other settings: {changes}. Restore them, or start a new "
            "run with train.resume=never. To train a finished adapter further on other data or with other settings, "
            "export it with --to merged, and name that folder as the model."
        )


def _short(value: Any) -> str:
    """A setting, or the beginning of a digest."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)


def refuse_other_rates(checkpoint: Checkpoint, optim: Optim, total_steps: int) -> None:
    """InputError if the recipe gives the steps already taken other learning rates than they were taken with."""
    taken = checkpoint.position.step
    if checkpoint.position.rates_sha256 != rates_sha256(optim, taken, total_steps):
        raise InputError(
            f"{checkpoint.folder}: its {taken} steps were taken with other learning rates than this recipe gives them: "
            "optim.schedule, optim.warmup or the number of steps changed. Restore them, or set train.resume=never."
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return peft_files.read_tensors(path)
    except AdapterError as error:
        raise QloraError(str(error)) from error
