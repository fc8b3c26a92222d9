"""Upper limits on model sizes: a corrupt config.json is refused before any model code runs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora.errors import BaseModelError

if TYPE_CHECKING:  # the memory planner imports these limits too, and must start without torch
    from torch import nn

LAYERS = 1_000
WIDTH = 2**20
LIMITS = {
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "hidden_size": WIDTH, "n_embd": WIDTH, "d_model": WIDTH, "head_dim": WIDTH,
    "intermediate_size": 2**24, "n_inner": 2**24, "ffn_dim": 2**24,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "n_head": 2**16,
    "vocab_size": 2**25,
}  # fmt: skip
BUFFER_BYTES = 2**30  # rotary frequencies and masks of a real model take megabytes


def check_config_sizes(config: Mapping[str, Any], where: str = "config.json") -> None:
    """BaseModelError for a size above LIMITS, at any depth of the configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_config_sizes(value, f"{where}: {key}")
        elif key in LIMITS and isinstance(value, int | float) and not -1 <= value <= LIMITS[key]:
            raise BaseModelError(f"model: {where}: {key}: found {value!r}, allowed: at most {LIMITS[key]:,}.")


def check_buffer_sizes(model: "nn.Module") -> None:
    """BaseModelError if the buffers of a model on `meta` would take more than BUFFER_BYTES."""
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if total > BUFFER_BYTES:
        raise BaseModelError(f"model: config.json makes buffers of {total:,} bytes, allowed: at most {BUFFER_BYTES:,}.")
