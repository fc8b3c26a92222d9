"""config.json in the words of transformers 4 and 5: a reader that knows one of them computes the same model.

transformers 5 keeps all rotary settings in `rope_parameters`. Ollama, mlx-lm, llama.cpp's converter and transformers 4
read `rope_theta` and `rope_scaling`, and take their own defaults without a word where these are missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

TEXT, ROPE = "text_config", "rope_parameters"
FULL, SLIDING = "full_attention", "sliding_attention"
NESTED = ("gemma3", "olmo3")  # other models with settings by kind of layer have no form in transformers 4
_BESIDE = ("rope_theta", "partial_rotary_factor")  # keys of rope_parameters that transformers 4 keeps outside


def in_both_dialects(config: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """`config` with the settings that one of the two lacks. text: transformers' configuration of its text model."""
    inner = config.get(TEXT)
    if isinstance(inner, dict):
        return {**config, TEXT: with_rope(inner, text)}
    return with_rope(config, text)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with the dtype of its tensors under both names; in a text model's section too, if it names one."""
    both = {"torch_dtype": dtype, "dtype": dtype}
    inner = config.get(TEXT)
    names_one = isinstance(inner, dict) and inner.keys() & both.keys()
    return {**config, **both, **({TEXT: {**inner, **both}} if names_one and isinstance(inner, dict) else {})}


def with_rope(part: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """The section of a text model with its rotary settings in both forms; keys that it has are kept."""
    rope = getattr(text, ROPE, None)
    if not isinstance(rope, Mapping) or not rope:
        return dict(part)
    model_type = str(part.get("model_type", ""))
    if not any(isinstance(value, Mapping) for value in rope.values()):
        return {ROPE: _plain(rope), **_flat(rope, model_type), **part}
    if not model_type.startswith(NESTED):
        return dict(part)
    return {ROPE: _plain(rope), **_nested(rope, model_type, part.get("layer_types") or ()), **part}


def _flat(rope: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """rope_theta and rope_scaling for one kind of layer."""
    theta, share = (rope.get(key) for key in _BESIDE)
    old = {"rope_theta": theta, "rope_scaling": _scaling(rope, model_type)}
    if share is not None and share != 1.0:
        old["partial_rotary_factor"] = share
    if model_type.startswith("gpt_neox"):
        old |= {"rotary_emb_base": theta, "rotary_pct": 1.0 if share is None else share}
    original = rope.get("original_max_position_embeddings")
    if model_type == "phi3" and original is not None:
        old["original_max_position_embeddings"] = original
    return old


def _nested(rope: Mapping[str, Any], model_type: str, layer_types: Sequence[str]) -> dict[str, Any]:
    """The settings of full-attention layers; the base frequency of sliding ones has a key of its own in Gemma 3."""
    old = _flat(rope[FULL], model_type)
    sliding = rope.get(SLIDING)
    if isinstance(sliding, Mapping) and model_type.startswith("gemma3"):
        old["rope_local_base_freq"] = sliding.get("rope_theta")
    pattern = window_pattern(layer_types)
    if pattern and model_type.startswith("gemma3"):
        old["sliding_window_pattern"] = pattern
    return old


def window_pattern(layer_types: Sequence[str]) -> int | None:
    """N if every N-th layer, and no other, has full attention; None if there is no such N."""
    full = [index for index, kind in enumerate(layer_types, start=1) if kind == FULL]
    if full and full == list(range(full[0], len(layer_types) + 1, full[0])):
        return full[0]
    return None


def _scaling(rope: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    """rope_scaling; None for the default kind. Phi-3's reader in transformers 4 takes exactly three keys."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if model_type == "phi3" and kind == "longrope":
        return {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return _plain({key: value for key, value in rope.items() if key not in _BESIDE})


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as JSON has it."""
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in rope.items()}
