"""Values of a parsed config.json, with a family's defaults for missing keys and errors that name the key."""

from collections.abc import Mapping
from typing import Any

from qlora.errors import BaseModelError
from qlora.memory.planner.family import ConfigSwitch, Family

# Keys that mean the same; the first one that config.json has is taken.
EXPERT_COUNT = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "num_experts_per_token", "moe_topk")
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")


class ConfigValues:
    """The text model's part of one config.json."""

    def __init__(self, config: Mapping[str, Any], text: Mapping[str, Any], family: Family, name: str) -> None:
        self.config, self.family, self.name = config, family, name
        self.stored = {**text, **_delta_attention(text)}
        self.text = {**family.defaults, **self.stored}
        self.is_wrapped = text is not config  # in the configuration of a model with towers

    def get(self, *keys: str) -> Any:
        """The value of the first key that config.json has, else of the first that the family's defaults have."""
        for values in (self.stored, self.family.defaults):
            for key in keys:
                if values.get(key) is not None:
                    return values[key]
        return None

    def size(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; the default if it is missing or null."""
        value = self.get(*keys)
        value = default if value is None else value
        if type(value) is not int or value < least:
            allowed = "a positive integer" if least == 1 else f"an integer from {least}"
            raise BaseModelError(f"model: {self.name}: config.json: {keys[0]} is {value!r}; {allowed} is needed.")
        return value

    def layer_size(self, key: str, layer: int, default: int | None = None) -> int:
        """A size that may be a list with one value a layer."""
        value = self.get(key)
        if not isinstance(value, list):
            return self.size(key, default=default)
        if layer >= len(value) or type(value[layer]) is not int or value[layer] < 0:
            raise BaseModelError(
                f"model: {self.name}: config.json: {key} is {value!r}; an integer, or one for every layer, is needed."
            )
        return int(value[layer])

    def enabled(self, switch: ConfigSwitch) -> bool:
        """The value of a switch for this model."""
        return bool(self.text.get(switch)) if isinstance(switch, str) else switch

    def names(self, *keys: str) -> list[str] | None:
        """A list of texts, one for every layer; None if it is missing."""
        value = self.get(*keys)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise BaseModelError(f"model: {self.name}: config.json: {keys[0]} is {value!r}; a list of names is needed.")
        return value

    def indices(self, key: str) -> list[int] | None:
        """A list of layer numbers; None if it is missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise BaseModelError(f"model: {self.name}: config.json: {key} is {value!r}; a list of numbers is needed.")
        return value

    def error(self, text: str) -> BaseModelError:
        """An error about this config.json."""
        return BaseModelError(f"model: {self.name}: config.json: {text}")

    def dtype(self) -> str | None:
        """`bfloat16` and the like: transformers 5 writes `dtype`, earlier versions `torch_dtype`."""
        pairs = [(config, key) for config in (self.text, self.config) for key in ("dtype", "torch_dtype")]
        return next((str(config[key]).removeprefix("torch.") for config, key in pairs if config.get(key)), None)


def _delta_attention(text: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of Kimi Linear's `linear_attn_config` under the names of transformers; its layers count from 1."""
    nested = text.get("linear_attn_config")
    if not isinstance(nested, Mapping):
        return {}
    names = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
    names["short_conv_kernel_size"] = "linear_conv_kernel_dim"
    values = {name: nested[key] for key, name in names.items() if key in nested}
    layers = nested.get("full_attn_layers")
    return values | ({"full_attn_idxs": [layer - 1 for layer in layers]} if isinstance(layers, list) else {})
