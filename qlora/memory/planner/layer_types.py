"""Which parts each decoder layer has, by config.json's lists, patterns and periods."""

from typing import Literal

from qlora.memory.planner.config_values import EXPERT_COUNT, ConfigValues

MixerType = Literal["full", "sliding", "recurrent", "none"]
FeedType = Literal["dense", "sparse", "none"]
_MIXERS: dict[str, MixerType] = {
    "full_attention": "full", "attention": "full", "sliding_attention": "sliding", "sliding": "sliding",
    "linear_attention": "recurrent", "mamba": "recurrent", "conv": "recurrent", "moe": "none", "mlp": "none",
}  # fmt: skip
_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}  # Nemotron-H
_FEEDS: dict[str, FeedType] = {"moe": "sparse", "mlp": "dense"}


def layer_count(config: ConfigValues) -> int:
    """The number of decoder layers."""
    return len(_types(config, 0)) if config.family.one_part else config.size("num_hidden_layers")


def layer_parts(config: ConfigValues, layers: int) -> list[tuple[MixerType, FeedType]]:
    """The mixer and the feed-forward part of each layer. BaseModelError for a type that is not known."""
    types = _types(config, layers)
    unknown = sorted(set(types) - _MIXERS.keys())
    if unknown or len(types) < layers:
        raise config.error(f"layer_types is {types!r}; {layers} of {', '.join(_MIXERS)} are needed.")
    if config.family.one_part:
        return [(_MIXERS[kind], _FEEDS.get(kind, "none")) for kind in types]
    return [(_MIXERS[kind], "sparse" if _is_sparse(config, layer) else "dense") for layer, kind in enumerate(types)]


def _types(config: ConfigValues, layers: int) -> list[str]:
    """The type of each layer's mixer, in the words of transformers."""
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and config.stored.get("layers_block_type") is None:
        return [_PATTERN.get(letter, letter) for letter in pattern]
    names = config.names("layer_types", "layers_block_type")
    if names is not None:
        return names if config.family.one_part else names[:layers]
    attention = _attention_layers(config, layers)
    if config.family.recurrent is None or config.family.recurrent.beside_attention:
        return [_by_window(config, layer) for layer in range(layers)]
    return ["full_attention" if layer in attention else "linear_attention" for layer in range(layers)]


def _attention_layers(config: ConfigValues, layers: int) -> set[int]:
    """The layers of a hybrid that have attention: listed, or one in so many."""
    for key in ("attn_layer_indices", "full_attn_idxs"):
        listed = config.indices(key)
        if listed is not None:
            return set(listed)
    if config.get("attn_layer_period") is not None:
        period, offset = config.size("attn_layer_period"), config.size("attn_layer_offset", least=0)
        return {layer for layer in range(layers) if layer % period == offset}
    if config.get("full_attention_interval") is not None:
        interval = config.size("full_attention_interval")
        return {layer for layer in range(layers) if (layer + 1) % interval == 0}
    return set()


def _by_window(config: ConfigValues, layer: int) -> str:
    """Sliding windows in all layers but one in so many, where a family has both."""
    if config.get("sliding_window_pattern") is None or not isinstance(config.get("sliding_window_pattern"), int):
        return "sliding_attention"
    return "sliding_attention" if (layer + 1) % config.size("sliding_window_pattern") else "full_attention"


def _is_sparse(config: ConfigValues, layer: int) -> bool:
    """Whether a layer has experts in place of a dense MLP."""
    form = config.family.experts
    if form is None or form.beside_dense:
        return form is not None and config.enabled("enable_moe_block")
    if config.size(*EXPERT_COUNT, default=0, least=0) < 2:
        return False
    listed = config.names("mlp_layer_types")
    if listed is not None:
        return layer < len(listed) and listed[layer] == "sparse"
    return _by_period(config, layer)


def _by_period(config: ConfigValues, layer: int) -> bool:
    """Whether a layer is sparse by the periods and numbers of config.json."""
    if config.get("expert_layer_period") is not None:
        return layer % config.size("expert_layer_period") == config.size("expert_layer_offset", least=0)
    if config.get("decoder_sparse_step") is not None:
        dense = config.indices("mlp_only_layers") or []
        return layer not in dense and (layer + 1) % config.size("decoder_sparse_step") == 0
    if config.get("moe_layer_start_index") is not None:
        first, interval = config.size("moe_layer_start_index", least=0), config.size("moe_layer_interval")
        end = config.get("moe_layer_end_index")
        last = layer if end in (None, -1) else config.size("moe_layer_end_index")
        return first <= layer <= last and (layer + 1) % interval == 0
    return layer >= config.size("first_k_dense_replace", "num_dense_layers", default=0, least=0)
