"""Model files of a run with adapter.kind full.

The run folder is a model that transformers loads; a checkpoint holds the float32 master weights.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapters.peft_files import refuse_non_finite
from qlora.errors import QloraError
from qlora.model.download import tokenizer_files
from qlora.model.hf_config import merged_config, with_untied_head
from qlora.model.load_base import Base
from qlora.model.meta_model import key_renamer, names_by_key, unties_head
from qlora.model.model_folder import CONFIG, model_files
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.model.safetensors_writer import PROGRESS, PlannedTensor, write_model
from qlora.utils.atomic_files import PARTIAL, sync_folder, write_bytes, write_json
from qlora.utils.atomic_folders import remove

OTHER_MODEL = "It is a checkpoint of another model: name the model it was trained from, or set train.resume=never."


def write(folder: Path, base: Base, dtype: torch.dtype) -> None:
    """Write the model, floating-point tensors in `dtype`, with its config and tokenizer files.

    config.json names the compute dtype of the run, which may differ from `dtype`. QloraError, and nothing is written,
    if a value is not finite.
    """
    refuse_non_finite(dict(base.model.named_parameters()), folder / CONFIG)
    unfinished = folder / f"{PARTIAL}model"
    remove(unfinished)
    unfinished.mkdir(parents=True)
    write_model(unfinished, list(_planned(base, dtype)))
    (unfinished / PROGRESS).unlink()
    for old_file in model_files(folder):
        remove(old_file)
    for file in sorted(unfinished.iterdir()):
        file.rename(folder / file.name)
    unfinished.rmdir()
    sync_folder(folder)
    for file in (*tokenizer_files(base.folder.path), base.folder.path / "generation_config.json"):
        if file.is_file():
            write_bytes(folder / file.name, file.read_bytes())
    config = merged_config(base.folder.path / CONFIG, base.dtype)
    write_json(folder / CONFIG, with_untied_head(config) if unties_head(base.folder.path) else config)


@torch.no_grad()
def fill(folder: Path, model: nn.Module) -> None:
    """Copy the master weights of a checkpoint into `model`. QloraError if the checkpoint is of another model."""
    named, shards = dict(model.named_parameters(remove_duplicate=False)), SafetensorsReader(folder)
    rename, missing = key_renamer(model, folder), {name for name, value in named.items() if value.requires_grad}
    for key in shards:
        name = rename(key)
        if name not in named or named[name].shape != shards.shape(key):
            raise QloraError(f"{folder}: {key!r} matches no parameter of this model. {OTHER_MODEL}")
        named[name].copy_(shards[key])
        missing -= {other for other in missing if named[other] is named[name]}
    if missing:
        raise QloraError(f"{folder}: lacks {', '.join(sorted(missing)[:3])}. {OTHER_MODEL}")


def _planned(base: Base, dtype: torch.dtype) -> Iterator[PlannedTensor]:
    """Every tensor under its key in the base model's files; tensors that are not trained are copied from there."""
    named, shards = dict(base.model.named_parameters(remove_duplicate=False)), SafetensorsReader(base.folder.path)
    for key, name in names_by_key(base.model, base.folder.path, shards).items():
        stored = dtype if shards.is_float(key) else shards[key].dtype
        yield PlannedTensor(key, shards.shape(key), stored, partial(_values, named, name, shards, key))


def _values(named: dict[str, nn.Parameter], name: str, shards: SafetensorsReader, key: str) -> Tensor:
    return named[name].detach() if name in named else shards[key]
