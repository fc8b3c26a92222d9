"""Model files of a run with adapter.kind full.

The run folder is a model that transformers loads; a checkpoint holds the float32 master weights.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapters.peft_files import refuse_non_finite
from qlora.errors import QloraError
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.download import tokenizer_files
from qlora.model.hf_config import merged_config, with_untied_head, write_config
from qlora.model.layouts.checkpoint_layout import read_layout
from qlora.model.layouts.pieces import TensorSource, assemble
from qlora.model.load_base import Base
from qlora.model.meta_model import unties_head
from qlora.model.model_folder import CONFIG, model_files
from qlora.model.open_checkpoint import open_checkpoint
from qlora.model.safetensors_writer import PROGRESS, PlannedTensor, write_model
from qlora.utils.atomic_files import PARTIAL, sync_folder, write_bytes
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
    write_config(folder, with_untied_head(config) if unties_head(base.folder.path) else config, base.folder.path)


@torch.no_grad()
def fill(folder: Path, model: nn.Module) -> None:
    """Copy the master weights of a checkpoint into `model`. QloraError if the checkpoint is of another model."""
    named, shards = dict(model.named_parameters(remove_duplicate=False)), open_checkpoint(folder)
    missing = {name for name, value in named.items() if value.requires_grad}
    layout = read_layout(model, shards)
    if layout.ignored:
        raise QloraError(f"{folder}: {layout.ignored[0]!r} matches no parameter of this model. {OTHER_MODEL}")
    for name, source in layout.sources.items():
        if name not in named or named[name].shape != source.shape(shards):
            raise QloraError(f"{folder}: {source.key!r} matches no parameter of this model. {OTHER_MODEL}")
        named[name].copy_(source.read(shards))
        missing -= {other for other in missing if named[other] is named[name]}
    if missing:
        raise QloraError(f"{folder}: lacks {', '.join(sorted(missing)[:3])}. {OTHER_MODEL}")


def _planned(base: Base, dtype: torch.dtype) -> Iterator[PlannedTensor]:
    """Every tensor under its key in the base model's files; tensors that are not trained are copied from there."""
    named, shards = dict(base.model.named_parameters(remove_duplicate=False)), open_checkpoint(base.folder.path)
    layout = read_layout(base.model, shards)
    for key in [key for key in shards if key in layout.by_key or key in layout.ignored]:
        sources = layout.by_key.get(key, [])
        stored = dtype if shards.is_float(key) and sources else shards[key].dtype
        yield PlannedTensor(key, shards.shape(key), stored, partial(_values, named, sources, shards, key))


def _values(
    named: dict[str, nn.Parameter], sources: Sequence[TensorSource], shards: CheckpointReader, key: str
) -> Tensor:
    """A tensor of the base's files with the values of the model's parameters that it holds."""
    if not all(source.name in named for source in sources) or not sources:
        return shards[key]
    return assemble(key, sources, lambda name: named[name].detach(), shards)
