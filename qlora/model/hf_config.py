"""A base model's config.json as an export writes it: dtype, tied head and vocabulary size changed, the rest kept."""

import json
from pathlib import Path
from typing import Any

import torch

from qlora.model.dtypes import name_of


def merged_config(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json without its quantisation, its dtype as written; nothing else is touched."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = name_of(dtype)
    return config


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says that the head is a tensor of its own."""
    parts = {key: value | {"tie_word_embeddings": False} for key, value in config.items() if key == "text_config"}
    return config | parts | {"tie_word_embeddings": False}


def grown(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A config.json for a vocabulary of at least so many rows."""
    inner = config.get("text_config")
    text = {"text_config": grown(inner, rows)} if isinstance(inner, dict) else {}
    known = config.get("vocab_size")
    return config | text | ({"vocab_size": rows} if isinstance(known, int) and known < rows else {})
