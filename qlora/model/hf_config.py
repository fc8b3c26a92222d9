"""config.json of an exported model: dtype, tied head and vocabulary size changed, the rest kept."""

import json
from pathlib import Path
from typing import Any

import torch

from qlora.model.config_dialects import ROPE, in_both_dialects, with_dtype
from qlora.model.dtypes import dtype_name
from qlora.model.meta_model import read_config
from qlora.model.model_folder import CONFIG
from qlora.utils.atomic_files import write_json

QUANTIZATION = ("quantization_config", "compression_config")


def merged_config(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json with `dtype` and without its quantization."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION:
            part.pop(key, None)
    return with_dtype(config, dtype_name(dtype))


def write_config(folder: Path, config: dict[str, Any], base_folder: Path) -> None:
    """Write config.json with the rotary settings in the forms of transformers 4 and 5, if both read as the base's."""
    text = read_config(base_folder).get_text_config()
    write_json(folder / CONFIG, in_both_dialects(config, text))
    written = read_config(folder).get_text_config()
    if getattr(written, ROPE, None) != getattr(text, ROPE, None):
        write_json(folder / CONFIG, config)


def with_untied_head(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose head is a tensor separate from the embedding."""
    text = {key: value | {"tie_word_embeddings": False} for key, value in config.items() if key == "text_config"}
    return config | text | {"tie_word_embeddings": False}


def with_vocab_size(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A config.json whose vocabulary has `rows` tokens."""
    inner = config.get("text_config")
    text = {"text_config": with_vocab_size(inner, rows)} if isinstance(inner, dict) else {}
    return config | text | ({"vocab_size": rows} if "vocab_size" in config else {})
