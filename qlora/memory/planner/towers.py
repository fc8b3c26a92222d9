"""Parameters of a wrapper checkpoint that are not loaded: image and sound towers, heads of further tokens.

They count for the disk of a merge, which restores every tensor. A tower is estimated as a transformer of its sizes.
"""

from collections.abc import Mapping
from typing import Any

_SECTIONS = ("vision_config", "audio_config")
_DEFAULTS = {  # of transformers, where a published configuration omits a size
    "gemma3": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
    "mistral3": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
}
_GATED = ("pixtral",)  # three matrices in each MLP


def tower_values(config: Mapping[str, Any], hidden: int) -> int:
    """Parameters of the towers beside a text model of so many hidden features; 0 without towers."""
    sections = ((name, config.get(name)) for name in _SECTIONS)
    return sum(_tower(config, name, section, hidden) for name, section in sections if isinstance(section, Mapping))


def _tower(config: Mapping[str, Any], name: str, section: Mapping[str, Any], hidden: int) -> int:
    defaults = _DEFAULTS.get(str(config.get("model_type")), {}) if name == "vision_config" else {}
    wide = _size(section, defaults, "hidden_size", "embed_dim")
    layers = _size(section, defaults, "num_hidden_layers", "depth", "num_layers")
    inner = _size(section, defaults, "intermediate_size") or 4 * wide
    matrices = 3 if section.get("model_type") in _GATED else 2
    return layers * (4 * wide**2 + matrices * wide * inner) + wide * hidden


def _size(section: Mapping[str, Any], defaults: Mapping[str, int], *keys: str) -> int:
    """The first size that is a positive integer; 0 if none is."""
    values = (values.get(key) for values in (section, defaults) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), 0)
