"""GGUF files of tiny models, whole or with planted faults."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.exporters.gguf.gguf import plan_tensors
from qlora.exporters.gguf.gguf_architectures import architecture_of
from qlora.exporters.gguf.gguf_file import PlannedGguf, Value, write_gguf
from qlora.exporters.gguf.metadata import architecture_metadata
from qlora.model.layouts.checkpoint_layout import read_layout
from qlora.model.meta_model import build_meta_model, read_config
from qlora.model.open_checkpoint import open_checkpoint

Spoil = Mapping[str, Callable[[Tensor], Tensor]]


def write_model_file(
    folder: Path,
    path: Path,
    storage: str = "float32",
    spoil: Spoil | None = None,
    keys: Mapping[str, Value] | None = None,
) -> Path:
    """The file of a model folder without a vocabulary.

    spoil: name of a tensor -> what is done to its values. keys: metadata that replace the model's; "" leaves one out.
    """
    skeleton: Any = build_meta_model(read_config(folder), torch.float32, "auto", torch.device("cpu"))
    architecture, reader = architecture_of(skeleton), open_checkpoint(folder)
    tensors = plan_tensors(architecture, skeleton, read_layout(skeleton, reader), reader, storage)
    tensors = [_spoilt(tensor, (spoil or {}).get(tensor.name)) for tensor in tensors]
    metadata = architecture_metadata(architecture, skeleton.config.get_text_config()) | dict(keys or {})
    write_gguf(path, architecture.name, {key: value for key, value in metadata.items() if value != ""}, tensors)
    return path


def _spoilt(tensor: PlannedGguf, change: Callable[[Tensor], Tensor] | None) -> PlannedGguf:
    return tensor if change is None else replace(tensor, make=partial(_changed, tensor, change))


def _changed(tensor: PlannedGguf, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(tensor.make())
