"""The base's matrices as the checkpoint stores them, one at a time: the reference that an update is compared with."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qlora.model.bnb_checkpoint import companion_keys, is_prequantized, read_4bit_layer
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.layouts.checkpoint_layout import read_layout
from qlora.model.layouts.pieces import TensorSource
from qlora.model.meta_model import build_meta_model, read_config
from qlora.model.open_checkpoint import open_checkpoint


def iter_weights(folder: Path, paths: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Module path and weight [O, I] in float32 of the linear layers at `paths`; one weight is in memory at a time.

    BaseModelError if the folder is damaged or its architecture can't be read.
    """
    reader = open_checkpoint(folder)
    model = build_meta_model(read_config(folder), torch.float32, "auto", torch.device("cpu"))
    packed = {key for key in reader if is_prequantized(key, reader)}
    companions = {companion for key in packed for companion in companion_keys(key)}
    for name, source in read_layout(model, reader, companions).sources.items():
        path = name.removesuffix(".weight")
        if path in paths and name.endswith(".weight"):
            yield path, _weight(reader, source, source.key in packed)


def _weight(reader: CheckpointReader, source: TensorSource, packed: bool) -> Tensor:
    if packed:
        return read_4bit_layer(source.key, reader.__getitem__, reader).weight(torch.float32)
    return source.read(reader).float()
