"""Sizes that no model has: refused before a line of model code runs, so that a spoilt config.json stalls nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora.errors import BaseModelError

if TYPE_CHECKING:  # the planner, which is to answer at once, reads these limits too
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


def refuse_giants(config: Mapping[str, Any], where: str = "config.json") -> None:
    """BaseModelError for a size beyond any model's, at any depth of the configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_giants(value, f"{where}: {key}")
        elif key in LIMITS and isinstance(value, int | float) and not -1 <= value <= LIMITS[key]:
            raise BaseModelError(f"model: {where}: {key}: found {value!r}, allowed: at most {LIMITS[key]:,}.")


def refuse_giant_buffers(model: "nn.Module") -> None:
    """BaseModelError if the buffers of a skeleton on `meta` would take more memory than any model's."""
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if total > BUFFER_BYTES:
        raise BaseModelError(f"model: config.json makes buffers of {total:,} bytes, allowed: at most {BUFFER_BYTES:,}.")
