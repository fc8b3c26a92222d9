"""The reader of a model folder: tensors as they are stored, or decoded where they were released in quantized form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora.errors import BaseModelError
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.decoded_reader import DecodedReader
from qlora.model.dtypes import DTYPES
from qlora.model.model_folder import CONFIG
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.quant.released.find_released import find_released
from qlora.quant.released.settings import QuantizationSettings
from qlora.utils.atomic_files import read_json

CODES_BYTES = 32 * 2**20  # read through one mapping: unlike a tensor that is stored in 16 bits, codes are not kept


def open_checkpoint(folder: Path) -> CheckpointReader:
    """The reader of a folder's tensors; quantized ones are decoded to the dtype that config.json names.

    BaseModelError if a file is damaged, a storage format is not known, or scales are missing or do not fit.
    """
    files, config = SafetensorsReader(folder), _config(folder)
    try:
        settings = QuantizationSettings.parse(config)
        tensors = find_released(files, settings)
    except BaseModelError as error:
        raise error if str(error).startswith("model: ") else BaseModelError(f"model: {folder}: {error}") from error
    if not tensors and settings.method is None:
        return files
    return DecodedReader(SafetensorsReader(folder, files.files, CODES_BYTES), tensors, _dtype(config))


def _config(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json; empty if it has none, or one that is damaged, which building the model reports."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, Mapping) else {}


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the model's 16-bit tensors: bfloat16 unless config.json names another."""
    text = config.get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.")
            if name in DTYPES:
                return DTYPES[name]
    return torch.bfloat16
