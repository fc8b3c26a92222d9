"""A run that trains every weight: its folder is a model that transformers loads, its checkpoints hold the masters."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapters.peft_files import refuse_non_finite
from qlora.model.download import tokenizer_files
from qlora.model.load_base import Base
from qlora.model.safetensors_reader import Shards
from qlora.model.meta_model import renamer
from qlora.errors import QloraError
from qlora.model.hf_config import merged_config
from qlora.model.safetensors_writer import PROGRESS, Planned, write_model
from qlora.utils.atomic_files import ASIDE, sync_folder, write_bytes, write_json
from qlora.utils.atomic_folders import remove

CONFIG = "config.json"
ADAPTERLESS = "adapter.kind full trained every weight: this is a whole model, there is no adapter in it."


def write(folder: Path, base: Base, dtype: torch.dtype) -> None:
    """Write the model as it is now, floats in `dtype`, and what a loader needs beside it.

    config.json names the dtype that the run computes in, whatever the files hold. QloraError, and nothing is written,
    if a value is not finite.
    """
    refuse_non_finite(dict(base.model.named_parameters()), folder / CONFIG)
    aside = folder / f"{ASIDE}model"
    remove(aside)
    aside.mkdir(parents=True)
    write_model(aside, list(_planned(base, dtype)))
    (aside / PROGRESS).unlink()
    for old in model_files(folder):
        remove(old)
    for file in sorted(aside.iterdir()):
        file.rename(folder / file.name)
    aside.rmdir()
    sync_folder(folder)
    for file in (*tokenizer_files(base.folder.path), base.folder.path / "generation_config.json"):
        if file.is_file():
            write_bytes(folder / file.name, file.read_bytes())
    write_json(folder / CONFIG, merged_config(base.folder.path / CONFIG, base.dtype))


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's tensors, and their index."""
    found = (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json")
    return [file for file in found if file.is_file()]


def is_whole(folder: Path) -> bool:
    """Whether a whole model is in `folder`."""
    return (folder / CONFIG).is_file() and bool(model_files(folder))


@torch.no_grad()
def fill(folder: Path, model: nn.Module) -> None:
    """Overwrite the masters of `model` with those of a checkpoint. QloraError if it is of another model."""
    named, shards = dict(model.named_parameters(remove_duplicate=False)), Shards(folder)
    rename, waiting = renamer(model, folder), {name for name, value in named.items() if value.requires_grad}
    for key in shards:
        name = rename(key)
        if name not in named or named[name].shape != shards.shape(key):
            raise QloraError(f"{folder}: {key!r} has no place in this model.")
        named[name].copy_(shards[key])
        waiting -= {other for other in waiting if named[other] is named[name]}
    if waiting:
        raise QloraError(f"{folder}: lacks {', '.join(sorted(waiting)[:3])}.")


def _planned(base: Base, dtype: torch.dtype) -> Iterator[Planned]:
    """Every tensor under the key that the base's files have for it; what does not train is copied from there."""
    named, shards = dict(base.model.named_parameters(remove_duplicate=False)), Shards(base.folder.path)
    rename, tied = renamer(base.model, base.folder.path), set(base.model.all_tied_weights_keys)  # type: ignore[arg-type]
    for key in shards:
        name = rename(key)
        if name in tied:
            continue
        stored = dtype if shards.is_float(key) else shards[key].dtype
        yield Planned(key, shards.shape(key), stored, lambda key=key, name=name: _values(named, name, shards, key))  # type: ignore[misc]


def _values(named: dict[str, nn.Parameter], name: str, shards: Shards, key: str) -> Tensor:
    return named[name].detach() if name in named else shards[key]
