"""Metadata of a GGUF file's architecture, from a configuration of transformers and back.

Back means: a configuration takes on what the file says, so that a wrong or missing key changes what is computed.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.errors import QloraError
from qlora.exporters.gguf.gguf_architectures import Architecture, head_size, rope_sections
from qlora.exporters.gguf.gguf_file import GgufFile, Value

SIZES = {  # key -> attribute, of every architecture
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "vocab_size": "vocab_size",
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotary frequencies: llama.cpp's form of the scaling llama3
YARN = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def architecture_metadata(architecture: Architecture, config: Any) -> dict[str, Value]:
    """Keys and values of a configuration."""
    values: dict[str, Value] = {}
    for key, attribute in {**SIZES, **architecture.keys}.items():
        value = getattr(config, attribute, None)
        if value is not None:
            values[key] = value if isinstance(value, bool | int) else float(value)
    values["attention.head_count_kv"] = _kv_heads(config)
    values["attention.key_length"] = values["attention.value_length"] = head_size(config)
    ropes = rope_sections(config)
    full = ropes.get(FULL) or next(iter(ropes.values()))
    values["rope.dimension_count"] = int(head_size(config) * float(full.get("partial_rotary_factor", 1.0)))
    values["rope.freq_base"] = float(full["rope_theta"])
    if SLIDING in ropes:
        values["rope.freq_base_swa"] = float(ropes[SLIDING]["rope_theta"])
    values |= _scaling(full)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def rope_divisors(config: Any) -> Tensor | None:
    """The divisors [head size / 2] of the rotary frequencies for the scaling llama3; None for another."""
    rope = next(iter(rope_sections(config).values()))
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: short waves, which are kept
    return (1 / ((1 - smooth) / factor + smooth)).float()


def config_of_file(file: GgufFile, architecture: Architecture, config: Any) -> Any:
    """`config`, but what the file's metadata holds is the file's. QloraError if some is missing.

    What llama.cpp fixes in its code (layer patterns, activations) is the configuration's.
    """
    changed = deepcopy(config)
    text = changed.get_text_config()
    expected = architecture_metadata(architecture, text)
    missing = next((key for key in expected if file.get(key) is None), None)
    if missing:
        raise QloraError(f"{file.path}: the key {missing} is missing. Export it again.")
    values = {key.removeprefix(f"{architecture.name}."): file.get(key) for key in expected}
    for key, attribute in {**SIZES, **architecture.keys}.items():
        if key in values:
            _set_attribute(text, attribute, values[key])
    _set_attribute(text, "num_key_value_heads", values["attention.head_count_kv"])
    _set_attribute(text, "head_dim", values["attention.key_length"])
    ropes = {kind: _rope_of_file(values, kind, rope) for kind, rope in rope_sections(text).items()}
    text.rope_parameters = ropes.get("") or ropes
    _check_divisors(file, text)
    for part in (changed, text):
        part.tie_word_embeddings = architecture.has_head is False or "output.weight" not in file.tensors
    return changed


def _rope_of_file(values: Mapping[str, Any], kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(rope)
    _set_rope(rope, "rope_theta", values["rope.freq_base_swa" if kind == SLIDING else "rope.freq_base"])
    for name in ("factor", "original_max_position_embeddings", *YARN):
        key = "rope.scaling." + {"original_max_position_embeddings": "original_context_length", **YARN}.get(name, name)
        if key in values and kind != SLIDING:
            _set_rope(rope, name, values[key])
    if rope.get("rope_type") == "yarn":
        rope["truncate"] = True  # llama.cpp rounds the bounds of the ramp; gpt-oss does not, so that it shows
    return rope


def _scaling(rope: Mapping[str, Any]) -> dict[str, Value]:
    kind = str(rope.get("rope_type", "default"))
    if kind not in ("linear", "yarn"):
        return {}
    values: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        values |= {f"rope.scaling.{key}": float(rope[name]) for name, key in YARN.items() if rope.get(name) is not None}
    return values


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _check_divisors(file: GgufFile, config: Any) -> None:
    expected = rope_divisors(config)
    actual = file.values(ROPE_FREQS) if ROPE_FREQS in file.tensors else None
    if (expected is None) != (actual is None) or (
        expected is not None and actual is not None and not torch.allclose(expected, actual, rtol=1e-6)
    ):
        raise QloraError(
            f"{file.path}: {ROPE_FREQS} is not this model's scaling of rotary frequencies. Export it again."
        )


def _set_attribute(config: Any, attribute: str, value: Any) -> None:
    """Set an attribute, unless it is None, which the class replaces itself, or differs by float32's rounding only."""
    old = getattr(config, attribute, None)
    if old is not None and np.float32(old) != np.float32(value):
        setattr(config, attribute, value)


def _set_rope(rope: dict[str, Any], name: str, value: Any) -> None:
    """Set one of the rotary parameters in the same way."""
    if rope.get(name) is not None and np.float32(rope[name]) != np.float32(value):
        rope[name] = value
