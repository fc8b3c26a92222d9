"""Dense models of attention and MLP: one line a model_type. `defaults` are what config.json may omit."""

from collections.abc import Mapping
from typing import Any

from qlora.memory.planner.family import AFTER, AROUND, Family, sizes

BIASES: Mapping[str, Any] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
FUSED_MLP = ("gate_up_proj", "down_proj")
UP_DOWN = ("up_proj", "down_proj")
SANDWICH = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

_GEMMA3 = Family(
    sizes(262208, 2304, 9216, 26, 8, 4, head_dim=256, tie_word_embeddings=True, sliding_window=4096),
    **BIASES, wide_norms=AROUND, head_norms=True, window=True,
)  # fmt: skip

DENSE: Mapping[str, Family] = {
    "llama": Family(
        sizes(32000, 4096, 11008, 32, 32),
        **BIASES, mlp_bias="mlp_bias",
    ),
    "mistral": Family(sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096), window=True),
    "qwen2": Family(sizes(151936, 4096, 22016, 32, 32, 32), qkv_bias=True, window="use_sliding_window"),
    "qwen3": Family(
        sizes(151936, 4096, 22016, 32, 32, 32, head_dim=128),
        **BIASES, head_norms=True, window="use_sliding_window",
    ),
    "gemma": Family(
        sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256, tie_word_embeddings=True),
        **BIASES,
    ),
    "gemma2": Family(
        sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256, tie_word_embeddings=True, sliding_window=4096),
        **BIASES, wide_norms=AROUND, softcap=True, window=True,
    ),
    "gemma3_text": _GEMMA3,
    "phi3": Family(
        sizes(32064, 3072, 8192, 32, 32), projections=("qkv_proj", "o_proj"), mlp=FUSED_MLP, window=True
    ),
    "gpt_neox": Family(
        sizes(50432, 6144, 24576, 44, 64, attention_bias=True),
        layers_path="gpt_neox.layers", attention="attention", gated=False, layer_norm=True,
        projections=("query_key_value", "dense"), mlp=("dense_h_to_4h", "dense_4h_to_h"), embedding="embed_in",
        last_norm="final_layer_norm",
        **BIASES, mlp_bias=True,
    ),
    "granite": Family(
        sizes(32000, 4096, 11008, 32, 32), scaled=True,
        **BIASES, mlp_bias="mlp_bias",
    ),
    "smollm3": Family(
        sizes(128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True), window="use_sliding_window",
        **BIASES, mlp_bias="mlp_bias",
    ),
    "ministral3": Family(sizes(131072, 4096, 14336, 34, 32, 8, head_dim=128), window=True),
    "olmo2": Family(
        sizes(50304, 4096, 11008, 32, 32), wide_norms=AFTER, flat_norms=True,
        **BIASES,
    ),
    "olmo3": Family(
        sizes(50304, 4096, 11008, 32, 32, sliding_window=4096), wide_norms=AFTER, flat_norms=True, window=True,
        **BIASES,
    ),
    "exaone4": Family(
        sizes(102400, 4096, 16384, 32, 32, 32, sliding_window=4096), wide_norms=AFTER, head_norms=True, window=True
    ),
    "ernie4_5": Family(
        sizes(103424, 1024, 3072, 18, 16, 2, head_dim=128, tie_word_embeddings=True),
        qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias",
    ),
    "helium": Family(
        sizes(48000, 2560, 7040, 24, 20, 20, head_dim=128), qkv_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "cwm": Family(
        sizes(128256, 6144, 21504, 64, 48, 8, head_dim=128, sliding_window=8192), window=True, mlp_bias="mlp_bias"
    ),
    "seed_oss": Family(
        sizes(155136, 4096, 27648, 64, 80, 8, head_dim=128, attention_bias=True), qkv_bias="attention_bias",
        output_bias="attention_out_bias", mlp_bias="mlp_bias",
    ),
    "apertus": Family(
        sizes(131072, 4096, 14336, 32, 32), **BIASES, mlp=UP_DOWN, gated=False, mlp_kept=4, head_norms=True,
        activation_values=2, wide_norms=("attention_layernorm", "feedforward_layernorm"),
    ),
    "arcee": Family(sizes(32000, 2560, 18432, 32, 32), **BIASES, mlp=UP_DOWN, mlp_bias="mlp_bias", gated=False,
                    mlp_kept=2),
    "glm": Family(sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True),
        mlp=FUSED_MLP, qkv_bias="attention_bias", joined_rotary=True),
    "glm4": Family(
        sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True), mlp=FUSED_MLP,
        qkv_bias="attention_bias", wide_norms=SANDWICH, joined_rotary=True,
    ),
    "phi": Family(
        sizes(51200, 2048, 8192, 24, 32), projections=("q_proj", "k_proj", "v_proj", "dense"), mlp=("fc1", "fc2"),
        qkv_bias=True, output_bias=True, mlp_bias=True, gated=False, layer_norm=True, wide_norms=("input_layernorm",),
        last_norm="final_layernorm", head_bias=True,
    ),
    "ministral": Family(sizes(32000, 4096, 14336, 32, 32, 8, head_dim=128, sliding_window=4096), window=True),
    "internlm3": Family(sizes(128512, 4096, 10240, 48, 32, 2, head_dim=128), qkv_bias="qkv_bias", output_bias="bias",
        mlp_bias="bias"),
    "hunyuan_v1_dense": Family(sizes(290943, 4096, 11008, 32, 32, head_dim=128), **BIASES, head_norms=True),
    "starcoder2": Family(
        sizes(49152, 3072, 12288, 30, 24, 2, use_bias=True, tie_word_embeddings=True, sliding_window=None),
        mlp=("c_fc", "c_proj"), qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", gated=False,
        layer_norm=True, sequential=True, window=True,
    ),
    "granite_swa": Family(
        sizes(100352, 2560, 8192, 24, 20, 4, tie_word_embeddings=True, sliding_window=128, sliding_window_pattern=4),
        **BIASES, mlp_bias="mlp_bias", sinks=True, scaled=True, window=True,
    ),
    "youtu": Family(
        sizes(128256, 2048, 6144, 32, 16, 16, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64,
              qk_nope_head_dim=128, v_head_dim=128, tie_word_embeddings=True),
        latent=True, joined_rotary=True, qkv_bias="attention_bias",
    ),
    "gemma4_unified_text": Family(
        sizes(262144, 2304, 9216, 30, 8, 4, head_dim=256, global_head_dim=512, tie_word_embeddings=True,
              sliding_window=1024, sliding_window_pattern=6),
        **BIASES, wide_norms=AROUND, head_norms=True, window=True, global_heads=True,
        final_softcap="final_logit_softcapping",
    ),
    "gemma3n_text": Family(
        sizes(262400, 2048, 16384, 35, 8, 2, head_dim=256, tie_word_embeddings=True, sliding_window=512,
              num_kv_shared_layers=15, hidden_size_per_layer_input=256, vocab_size_per_layer_input=262144,
              altup_num_inputs=4, laurel_rank=64, sliding_window_pattern=5),
        qkv_bias="attention_bias", output_bias="attention_bias", wide_norms=AROUND, head_norms=True, window=True,
        layer_inputs=True, alternating=True, final_softcap="final_logit_softcapping",
    ),
}  # fmt: skip
