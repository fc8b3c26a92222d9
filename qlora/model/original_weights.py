"""The base's matrices as the checkpoint stores them, one at a time: the reference that an update is compared with."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qlora.model.bnb_checkpoint import companion_keys, is_prequantized, read_4bit_layer
from qlora.model.meta_model import build_meta_model, key_renamer, read_config
from qlora.model.safetensors_reader import SafetensorsReader


def iter_weights(folder: Path, paths: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Module path and weight [O, I] in float32 of the linear layers at `paths`; one weight is in memory at a time.

    BaseModelError if the folder is damaged or its architecture can't be read.
    """
    reader = SafetensorsReader(folder)
    model = build_meta_model(read_config(folder), torch.float32, "auto", torch.device("cpu"))
    rename = key_renamer(model, folder)
    packed = {key for key in reader if is_prequantized(key, reader)}
    companions = {companion for key in packed for companion in companion_keys(key)}
    for key in reader:
        path = rename(key).removesuffix(".weight") if key not in companions else ""
        if path in paths and key.endswith(".weight"):
            yield path, _weight(reader, key, key in packed)


def _weight(reader: SafetensorsReader, key: str, packed: bool) -> Tensor:
    if packed:
        return read_4bit_layer(key, reader.__getitem__, reader).weight(torch.float32)
    return reader[key].float()
