"""Mixtures of experts with attention in every layer: one line a model_type."""

from collections.abc import Mapping
from typing import Any

from qlora.memory.planner.dense_families import BIASES, SANDWICH
from qlora.memory.planner.family import AFTER, AROUND, ExpertForm, Family, sizes

_SHARED = ExpertForm(shared="shared_experts")
_LATENT: Mapping[str, Any] = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 512}
_LOW_RANK: Mapping[str, Any] = {"latent": True, "joined_rotary": True, "qkv_bias": "attention_bias"}

SPARSE: Mapping[str, Family] = {
    "qwen2_moe": Family(
        sizes(151936, 2048, 5632, 24, 16, 16, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
              num_experts=60, num_experts_per_tok=4, decoder_sparse_step=1, qkv_bias=True, sliding_window=4096),
        qkv_bias="qkv_bias", window="use_sliding_window",
        experts=ExpertForm(shared="shared_expert", shared_width="shared_expert_intermediate_size", shared_gate=True),
    ),
    "qwen3_moe": Family(
        sizes(151936, 2048, 6144, 24, 32, 4, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
              decoder_sparse_step=1, sliding_window=4096),
        **BIASES, head_norms=True, window="use_sliding_window", experts=ExpertForm(),
    ),
    "mixtral": Family(
        sizes(32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2), window=True,
        experts=ExpertForm(width="intermediate_size"),
    ),
    "olmoe": Family(
        sizes(50304, 2048, 2048, 16, 16, num_experts=64, num_experts_per_tok=8), **BIASES, flat_norms=True,
        experts=ExpertForm(width="intermediate_size"),
    ),
    "flex_olmo": Family(
        sizes(100352, 4096, 11008, 32, 32, num_experts=7, num_experts_per_tok=5), **BIASES, flat_norms=True,
        wide_norms=AFTER, experts=ExpertForm(width="intermediate_size"),
    ),
    "gpt_oss": Family(
        sizes(201088, 2880, 2880, 36, 64, 8, head_dim=64, sliding_window=128, num_local_experts=128,
              num_experts_per_tok=4, attention_bias=True, sliding_window_pattern=2),
        **BIASES, sinks=True, window=True, joined_rotary=True,
        experts=ExpertForm(width="intermediate_size", bias=True, router_values=1, kept=6),
    ),
    "glm4_moe": Family(
        sizes(151552, 4096, 10944, 46, 96, 8, moe_intermediate_size=1408, n_routed_experts=128, n_shared_experts=1,
              num_experts_per_tok=8, first_k_dense_replace=1),
        qkv_bias="attention_bias", head_norms="use_qk_norm", experts=_SHARED,
    ),
    "glm4_moe_lite": Family(
        sizes(154880, 2048, 10240, 47, 20, 20, moe_intermediate_size=1536, n_routed_experts=64, n_shared_experts=1,
              num_experts_per_tok=4, first_k_dense_replace=1, q_lora_rank=768,
              **{**_LATENT, "qk_nope_head_dim": 192, "v_head_dim": 256}),
        **_LOW_RANK, experts=_SHARED,
    ),
    "deepseek_v2": Family(
        sizes(102400, 4096, 11008, 32, 32, 32, moe_intermediate_size=1407, n_routed_experts=64, n_shared_experts=2,
              num_experts_per_tok=8, q_lora_rank=1536, **_LATENT),
        **_LOW_RANK, mlp_bias="mlp_bias", experts=_SHARED,
    ),
    "deepseek_v3": Family(
        sizes(129280, 7168, 18432, 61, 128, 128, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
              num_experts_per_tok=8, first_k_dense_replace=3, q_lora_rank=1536, **_LATENT),
        **_LOW_RANK, experts=_SHARED,
    ),
    "mistral4": Family(
        sizes(131072, 4096, 12288, 36, 32, 32, moe_intermediate_size=2048, n_routed_experts=128, n_shared_experts=1,
              num_experts_per_tok=4, q_lora_rank=1024,
              **{**_LATENT, "kv_lora_rank": 256, "qk_nope_head_dim": 64}),
        **_LOW_RANK, experts=_SHARED,
    ),
    "granitemoe": Family(
        sizes(32000, 4096, 11008, 32, 32, num_local_experts=8, num_experts_per_tok=2), **BIASES, scaled=True,
        experts=ExpertForm(width="intermediate_size", module="block_sparse_moe"),
    ),
    "granitemoeshared": Family(
        sizes(32000, 4096, 11008, 32, 32, num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=0),
        **BIASES, scaled=True, mlp_module="shared_mlp", mlp=("input_linear", "output_linear"),
        mlp_kept=4,
        experts=ExpertForm(width="intermediate_size", module="block_sparse_moe", shared="shared_mlp",
                           shared_width="shared_intermediate_size"),
    ),
    "phimoe": Family(
        sizes(32064, 4096, 6400, 32, 32, 8, num_local_experts=16, num_experts_per_tok=2), **BIASES, layer_norm=True,
        sequential=True, window=True, head_bias="lm_head_bias", experts=ExpertForm(width="intermediate_size"),
    ),
    "ernie4_5_moe": Family(
        sizes(103424, 2560, 12288, 28, 20, 4, moe_intermediate_size=1536, moe_num_experts=64, moe_k=6,
              moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_interval=1, tie_word_embeddings=True),
        qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias",
        experts=ExpertForm(shared="shared_experts", router_values=1),
    ),
    "mellum": Family(
        sizes(98304, 2304, 7168, 28, 32, 4, head_dim=128, moe_intermediate_size=896, num_experts=64,
              num_experts_per_tok=8, sliding_window=1024),
        **BIASES, head_norms=True, window=True, experts=ExpertForm(),
    ),
    "dots1": Family(
        sizes(152064, 4608, 10944, 62, 32, 32, moe_intermediate_size=1408, n_routed_experts=128, n_shared_experts=2,
              num_experts_per_tok=6),
        **BIASES, head_norms=True, experts=_SHARED,
    ),
    "afmoe": Family(
        sizes(200192, 2048, 6144, 32, 16, 16, head_dim=128, moe_intermediate_size=1408, num_dense_layers=1,
              num_experts=64, num_experts_per_tok=6, num_shared_experts=2, sliding_window=1024,
              sliding_window_pattern=4),
        qkv_bias="attention_bias", output_bias="attention_bias", head_norms=True, gate="full", window=True,
        wide_norms=("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
        experts=ExpertForm(shared="shared_experts", router_values=1),
    ),
    "exaone_moe": Family(
        sizes(102400, 4096, 16384, 32, 32, 32, moe_intermediate_size=1024, num_experts=64, num_experts_per_tok=8,
              num_shared_experts=1, first_k_dense_replace=1, sliding_window=4096, sliding_window_pattern=4),
        head_norms=True, window=True, experts=_SHARED,
    ),
    "minimax_m2": Family(
        sizes(200064, 3072, 1536, 62, 48, 8, head_dim=128, num_local_experts=256, num_experts_per_tok=8),
        flat_norms=True, experts=ExpertForm(width="intermediate_size"),
    ),
    "solar_open": Family(
        sizes(196608, 4096, 10240, 48, 64, 8, head_dim=128, moe_intermediate_size=1280, n_routed_experts=128,
              n_shared_experts=1, num_experts_per_tok=8),
        qkv_bias="attention_bias", experts=_SHARED,
    ),
    "laguna": Family(
        sizes(100352, 2048, 8192, 40, 48, 8, head_dim=128, moe_intermediate_size=512, num_experts=256,
              shared_expert_intermediate_size=512, num_experts_per_tok=8, first_k_dense_replace=1, sliding_window=512),
        **BIASES, head_norms=True, gate="heads", gate_name="g_proj", window=True,
        experts=ExpertForm(shared="shared_experts", shared_width="shared_expert_intermediate_size", router_values=1),
    ),
    "hy_v3": Family(
        sizes(120832, 4096, 13312, 80, 64, 8, head_dim=128, moe_intermediate_size=1536, num_experts=192,
              num_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=1),
        **BIASES, head_norms=True, mlp_bias="mlp_bias", experts=_SHARED,
    ),
    "kolibri1": Family(
        sizes(128000, 2560, 7168, 50, 48, 4, head_dim=128, moe_intermediate_size=512, num_local_experts=384,
              shared_expert_intermediate_size=512, num_experts_per_tok=6, sliding_window=513,
              sliding_window_pattern=5),
        head_norms=True, window=True, wide_norms=SANDWICH,
        experts=ExpertForm(shared="shared_experts", shared_width="shared_expert_intermediate_size"),
    ),
    "gemma4_text": Family(
        sizes(262144, 2304, 9216, 30, 8, 4, head_dim=256, global_head_dim=512, tie_word_embeddings=True,
              sliding_window=512, sliding_window_pattern=6, hidden_size_per_layer_input=256,
              vocab_size_per_layer_input=262144),
        qkv_bias="attention_bias", output_bias="attention_bias", wide_norms=AROUND, head_norms=True, window=True,
        global_heads=True, layer_inputs=True, final_softcap="final_logit_softcapping",
        experts=ExpertForm(module="", router_values=1, beside_dense=True),
    ),
}  # fmt: skip
