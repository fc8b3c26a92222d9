"""Checkpoints: an adapter folder plus optimizer state and position, written aside, verified before it is resumed.

`checkpoint-000200/` holds the adapter as PEFT reads it, `optimizer.safetensors`, `position.json`, and `manifest.json`,
whose `files` maps every other file to its sha256.  Safetensors and JSON only: resuming never runs somebody's code.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from qlora.adapters import peft_files
from qlora.errors import AdapterError, InputError, QloraError
from qlora.training.optimizers import load_state, state_tensors
from qlora.utils.atomic_files import manifest_of, plain_name, read_json, sha256_of, write_bytes, write_json
from qlora.utils.atomic_folders import folder_in_one_step, remove

NAME = re.compile(r"checkpoint-(\d{6,})")
EARLIER = "earlier-"  # a folder of checkpoints that a new run started over
MANIFEST, POSITION, OPTIMIZER = "manifest.json", "position.json", "optimizer.safetensors"
FORMAT = 1  # of the folder; another number was written by another version and is not guessed at
HOLDS = {POSITION, OPTIMIZER}
TRAINED = ({peft_files.WEIGHTS, peft_files.CONFIG}, {"config.json"})  # an adapter, or a whole model


@dataclass(frozen=True)
class Position:
    """Where a run stands between two optimizer steps: all that is not in the weights or the optimizer."""

    step: int = 0  # optimizer steps taken
    loss: float | None = None  # of the last logged line
    eval_loss: float | None = None  # of the last evaluation
    evaluated_step: int | None = None  # when that was
    skipped_steps: int = 0  # whose gradient was not finite
    open_loss: float = 0.0  # summed over the steps since the last logged line
    open_trained_tokens: int = 0
    best_loss: float | None = None  # lowest evaluation loss so far
    best_step: int | None = None
    evaluations_since_best: int = 0
    rates_sha256: str = ""  # of the learning rates of all steps taken


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found and verified."""

    folder: Path
    position: Position
    fixed: Mapping[str, Any]  # what may not change between two parts of a run

    @property
    def identity(self) -> str:
        """Two checkpoints of one identity hold the same bytes."""
        return sha256_of(self.folder / MANIFEST)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self, output: Path, keep: int, write_adapter: Callable[[Path], None], fixed: Mapping[str, Any]
    ) -> None:
        self.output, self.keep, self.write_adapter, self.fixed = output, keep, write_adapter, fixed

    def save(self, position: Position, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> Path:
        """Write `checkpoint-{step}` in one step, then remove the oldest beyond `keep`; the best one stays.

        QloraError if the disk refuses or a value is not finite; what was there before stays.
        """
        folder = self.folder_of(position.step)
        with folder_in_one_step(folder) as aside:
            self.write_adapter(aside)
            state = state_tensors(optimizer, named)
            peft_files.refuse_non_finite(state, folder / OPTIMIZER)
            write_bytes(aside / OPTIMIZER, peft_files.serialize(state))
            write_json(aside / POSITION, {**asdict(position), "fixed": dict(self.fixed)})
            write_json(aside / MANIFEST, {"format": FORMAT, "step": position.step, "files": manifest_of(aside)})
        self._prune(position)
        return folder

    def folder_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.output / f"checkpoint-{step:06d}"

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest checkpoint that verifies, and a line for each newer one that does not."""
        skipped: list[str] = []
        for folder in sorted(_folders(self.output), key=_step_of, reverse=True):
            try:
                return read(folder), skipped
            except InputError as error:
                skipped.append(f"skipped {error}")
        return None, skipped

    def set_aside(self) -> Path | None:
        """Move an earlier run's checkpoints out of the way of a new one; nothing is deleted. None if there are none."""
        folders = _folders(self.output)
        if not folders:
            return None
        number = 1 + sum(path.name.startswith(EARLIER) for path in self.output.iterdir())
        target = self.output / f"{EARLIER}{number}"
        target.mkdir()
        for folder in folders:
            folder.rename(target / folder.name)
        return target

    def _prune(self, position: Position) -> None:
        folders = sorted(_folders(self.output), key=_step_of)
        kept = {_step_of(folder) for folder in folders[-self.keep :]} | {position.best_step, position.step}
        for folder in folders:
            if _step_of(folder) not in kept and broken(folder) is None:
                remove(folder)


def read(folder: Path) -> Saved:
    """A checkpoint's position, after every file was checked against the manifest. InputError if one does not match."""
    reason = broken(folder)
    if reason:
        raise InputError(f"{folder}: {reason}. Resume from an older checkpoint, or start anew with train.resume=never.")
    try:
        values = read_json(folder / POSITION)
        fixed = values.pop("fixed")
        return Saved(folder, position_of(values), dict(fixed))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / POSITION}: says no position ({error}). Resume from an older one.") from error


def position_of(values: Mapping[str, Any]) -> Position:
    """A position out of JSON values. ValueError or TypeError, naming the entry, if one is not what it should be."""
    for name, kind in get_type_hints(Position).items():
        value = values[name]
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if isinstance(value, int | float):
            fits = fits and (math.isfinite(value) if isinstance(value, float) else 0 <= value < 2**53)
        if not fits:
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    return Position(**values)


def broken(folder: Path) -> str | None:
    """Why a checkpoint can't be used, or None if every file is as its manifest says."""
    try:
        text_ends = (folder / MANIFEST).read_bytes()[-2:] == b"}\n"
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        text_ends, manifest = False, {}
    files, version = manifest.get("files"), manifest.get("format")
    if not text_ends or not isinstance(files, dict):
        return f"{MANIFEST} is missing or damaged, so the checkpoint was never finished"
    if version != FORMAT or type(version) is not int:
        return f"{MANIFEST} has format {str(version)[:20]!r}; this version of qlora reads format {FORMAT}"
    if not files.keys() >= HOLDS or not any(files.keys() >= trained for trained in TRAINED):
        return f"{MANIFEST} does not list what a checkpoint holds"
    if manifest.get("step") != _step_of(folder) and NAME.fullmatch(folder.name):
        return f"{MANIFEST} is that of another step"
    return next((why for name, expected in files.items() if (why := _damage(folder, name, expected))), None)


def _damage(folder: Path, name: str, expected: Any) -> str | None:
    """What is wrong with a file that the manifest lists; a name that leads elsewhere is never followed."""
    path = folder / name if plain_name(name) else folder
    if path == folder or not path.is_file():
        return f"{name[:80]!r}, which {MANIFEST} names, is missing" + (", or no plain name" if path == folder else "")
    return None if sha256_of(path) == expected else f"{name} is damaged (its sha256 is not the manifest's)"


def restore(
    saved: Saved, fill: Callable[[Path], None], optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> Position:
    """Let `fill` put back what trains, and fill the optimizer, from a verified checkpoint; where the run stands."""
    fill(saved.folder)
    load_state(optimizer, named, _tensors(saved.folder / OPTIMIZER))
    return saved.position


def restore_adapter(folder: Path, model: nn.Module) -> None:
    """Fill the adapters of `model` from a checkpoint. AdapterError if it has other layers or another rank."""
    values, wanted = peft_files.read_named(folder / peft_files.WEIGHTS), peft_files.tensors(model)
    if values.keys() != wanted.keys() or any(values[key].shape != wanted[key].shape for key in wanted):
        raise AdapterError(f"{folder}: its adapter has other layers or another rank than the recipe asks for.")
    peft_files.fill(model, values)


def refuse_changes(saved: Saved, fixed: Mapping[str, Any]) -> None:
    """InputError, naming the keys, if the recipe or the data changed in what alters the mathematics."""
    changed = sorted(key for key in fixed.keys() | saved.fixed.keys() if fixed.get(key) != saved.fixed.get(key))
    if changed:
        listed = ", ".join(f"{key} (was {saved.fixed.get(key)!r}, is {fixed.get(key)!r})" for key in changed[:4])
        raise InputError(
            f"{saved.folder}: the run was started with other settings: {listed}. "
            "Put them back, or start anew with train.resume=never or another train.output."
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return peft_files.read_named(path)
    except AdapterError as error:
        raise QloraError(str(error)) from error


def _folders(output: Path) -> list[Path]:
    found = output.iterdir() if output.is_dir() else ()
    return [path for path in found if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _step_of(folder: Path) -> int:
    matched = NAME.fullmatch(folder.name)
    return int(matched.group(1)) if matched else -1
