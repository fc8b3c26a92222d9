"""Numeric settings of config.json for the fingerprint: the same weights with another rope are another base.

Only settings that change a forward pass count, as transformers resolves them. A file that lists its defaults, or that
another version wrote, is still the same base.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

SETTINGS = (
    "model_type", "hidden_act", "hidden_activation", "activation_function",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
    "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "use_sliding_window", "layer_types",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
    "use_parallel_residual", "clip_qkv", "rope_local_base_freq",
)  # fmt: skip
ROPE = (
    "rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "mscale", "mscale_all_dim",
    "partial_rotary_factor",
)  # fmt: skip
NEUTRAL = (None, False, "default", 1.0)  # values of a setting that change nothing


def canonical_numerics(config: Mapping[str, Any]) -> str:
    """The settings that change a forward pass, as canonical JSON; `config` is the text model's, resolved."""
    settings = {key: config[key] for key in SETTINGS if not _is_neutral(config.get(key))}
    settings |= dict(_rope(config))
    return json.dumps(_canonical(settings), sort_keys=True)


def _rope(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rotary settings from the top level, from one group, or from a group per kind of layer."""
    groups: dict[str, Mapping[str, Any]] = {"rope": config}
    for key in ("rope_scaling", "rope_parameters"):
        settings = config.get(key)
        if isinstance(settings, Mapping):
            nested = {f"rope.{name}": values for name, values in settings.items() if isinstance(values, Mapping)}
            groups |= nested or {"rope": {**config, **settings}}
    for group, values in groups.items():
        yield from ((f"{group}.{key}", values[key]) for key in ROPE if not _is_neutral(values.get(key)))


def _is_neutral(value: Any) -> bool:
    uniform = isinstance(value, list) and set(map(str, value)) == {"full_attention"}
    return uniform or (not isinstance(value, list | dict) and value in NEUTRAL)


def _canonical(value: Any) -> Any:
    """Numbers as floats, so that 10000 and 10000.0 are equal."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
