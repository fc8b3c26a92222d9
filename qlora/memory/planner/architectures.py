"""The table of architectures: how a decoder layer is built, as far as shapes, weights and saved activations go.

One entry per model_type; `defaults` are what config.json may omit. Each is tested against transformers' model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
ConfigSwitch = bool | str  # True, False, or the key of config.json that decides


@dataclass(frozen=True)
class Family:
    """The ways in which one architecture differs from others."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    layers_path: str = "model.layers"
    attention: str = "self_attn"
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    qkv_bias: ConfigSwitch = False
    output_bias: ConfigSwitch = False
    mlp_bias: ConfigSwitch = False
    gated: bool = True  # act(gate) * up; else act(up) alone
    layer_norm: bool = False  # LayerNorm with a bias, in the compute dtype; else RMSNorm in float32
    wide_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # over the hidden size, in one layer
    head_norms: bool = False  # a norm over each head's query and key
    flat_norms: bool = False  # a norm over all query heads together, and one over all key heads
    softcap: bool = False  # of attention scores: attention is eager then, with T x T scores in memory
    scaled: bool = False  # the logits are multiplied by a scale
    window: ConfigSwitch = False  # whether `sliding_window` is used

    @property
    def norms_after(self) -> bool:
        """Whether norms come after attention and MLP only."""
        return self.wide_norms == _AFTER

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one matrix."""
        return len(self.names) == 4


def _sizes(*values: int, **others: Any) -> dict[str, Any]:
    """Default values of config.json: the six sizes by position, other keys by name."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip((*keys, "num_key_value_heads"), values, strict=False)), **others}


_AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA3 = Family(
    _sizes(262208, 2304, 9216, 26, 8, 4, head_dim=256, tie_word_embeddings=True, sliding_window=4096),
    qkv_bias="attention_bias", output_bias="attention_bias", wide_norms=_AROUND, head_norms=True, window=True,
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        _sizes(32000, 4096, 11008, 32, 32),
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias",
    ),
    "mistral": Family(_sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096), window=True),
    "qwen2": Family(_sizes(151936, 4096, 22016, 32, 32, 32), qkv_bias=True, window="use_sliding_window"),
    "qwen3": Family(
        _sizes(151936, 4096, 22016, 32, 32, 32, head_dim=128),
        qkv_bias="attention_bias", output_bias="attention_bias", head_norms=True, window="use_sliding_window",
    ),
    "gemma": Family(
        _sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256, tie_word_embeddings=True),
        qkv_bias="attention_bias", output_bias="attention_bias",
    ),
    "gemma2": Family(
        _sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256, tie_word_embeddings=True, sliding_window=4096),
        qkv_bias="attention_bias", output_bias="attention_bias", wide_norms=_AROUND, softcap=True, window=True,
    ),
    "gemma3_text": _GEMMA3,
    "phi3": Family(
        _sizes(32064, 3072, 8192, 32, 32), names=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), window=True
    ),
    "gpt_neox": Family(
        _sizes(50432, 6144, 24576, 44, 64, attention_bias=True),
        layers_path="gpt_neox.layers", attention="attention", gated=False, layer_norm=True,
        names=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias=True,
    ),
    "granite": Family(
        _sizes(32000, 4096, 11008, 32, 32), scaled=True,
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias",
    ),
    "smollm3": Family(
        _sizes(128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True), window="use_sliding_window",
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias",
    ),
    "ministral3": Family(_sizes(131072, 4096, 14336, 34, 32, 8, head_dim=128), window=True),
    "olmo2": Family(
        _sizes(50304, 4096, 11008, 32, 32), wide_norms=_AFTER, flat_norms=True,
        qkv_bias="attention_bias", output_bias="attention_bias",
    ),
    "olmo3": Family(
        _sizes(50304, 4096, 11008, 32, 32, sliding_window=4096), wide_norms=_AFTER, flat_norms=True, window=True,
        qkv_bias="attention_bias", output_bias="attention_bias",
    ),
    "exaone4": Family(
        _sizes(102400, 4096, 16384, 32, 32, 32, sliding_window=4096), wide_norms=_AFTER, head_norms=True, window=True
    ),
    "ernie4_5": Family(
        _sizes(103424, 1024, 3072, 18, 16, 2, head_dim=128, tie_word_embeddings=True),
        qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias",
    ),
    "helium": Family(
        _sizes(48000, 2560, 7040, 24, 20, 20, head_dim=128), qkv_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "cwm": Family(
        _sizes(128256, 6144, 21504, 64, 48, 8, head_dim=128, sliding_window=8192), window=True, mlp_bias="mlp_bias"
    ),
}  # fmt: skip

# Models with a vision tower: the text model is configured by `text_config`, its modules are one level deeper.
NESTED: Mapping[str, str] = {"gemma3": "gemma3_text"}
SIGLIP: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "patch_size": 16, "image_size": 224, "num_channels": 3, "vision_use_head": True,
}  # fmt: skip
