"""What config.json says about the arithmetic: two bases with the same weights but another rope are two bases.

Only settings that change what a forward pass computes count, as transformers resolves them, so that a file that spells
its defaults out, or comes from another version, is still the same base.
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
PLAIN = (None, False, "default", 1.0)  # what a setting is where it changes nothing


def arithmetic_of(config: Mapping[str, Any]) -> str:
    """The settings that change the arithmetic, as canonical JSON; `config` is the text model's, resolved."""
    said = {key: config[key] for key in SETTINGS if not _is_plain(config.get(key))}
    said |= dict(_rope(config))
    return json.dumps(_canonical(said), sort_keys=True)


def _rope(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rotary settings, wherever they stand: at the top, in one group, or in a group a kind of layer."""
    groups: dict[str, Mapping[str, Any]] = {"rope": config}
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key)
        if isinstance(found, Mapping):
            nested = {f"rope.{name}": each for name, each in found.items() if isinstance(each, Mapping)}
            groups |= nested or {"rope": {**config, **found}}
    for group, values in groups.items():
        yield from ((f"{group}.{key}", values[key]) for key in ROPE if not _is_plain(values.get(key)))


def _is_plain(value: Any) -> bool:
    uniform = isinstance(value, list) and set(map(str, value)) == {"full_attention"}
    return uniform or (not isinstance(value, list | dict) and value in PLAIN)


def _canonical(value: Any) -> Any:
    """Numbers as floats, so that 10000 and 10000.0 are the same."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
