"""The base's own matrices, one after the other, as they are stored: what an update is measured against."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qlora.model.bnb_checkpoint import companions, is_prequantized, read
from qlora.model.meta_model import build, read_config, renamer
from qlora.model.safetensors_reader import Shards


def matrices(folder: Path, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Module path and weight [O, I] in float32 of every wanted linear layer of a model folder; one is held at a time.

    BaseModelError if the folder is damaged or its architecture can't be read.
    """
    shards = Shards(folder)
    skeleton = build(read_config(folder), torch.float32, "auto", torch.device("cpu"))
    rename = renamer(skeleton, folder)
    packed = {key for key in shards if is_prequantized(key, shards)}
    parts = {part for key in packed for part in companions(key)}
    for key in shards:
        path = rename(key).removesuffix(".weight") if key not in parts else ""
        if path in wanted and key.endswith(".weight"):
            yield (
                path,
                (read(key, shards.__getitem__, shards).weight(torch.float32) if key in packed else shards[key].float()),
            )
