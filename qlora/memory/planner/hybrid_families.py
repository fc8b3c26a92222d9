"""Hybrids of attention and recurrent mixers, dense or with experts: one line a model_type."""

from collections.abc import Mapping
from typing import Any

from qlora.memory.planner.dense_families import BIASES, UP_DOWN
from qlora.memory.planner.family import AFTER, ExpertForm, Family, RecurrentForm, sizes

_FEED_NORMS = ("input_layernorm", "pre_ff_layernorm")
_SHARED_GATED = ExpertForm(shared="shared_expert", shared_width="shared_expert_intermediate_size", shared_gate=True)
_DELTA: Mapping[str, Any] = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "full_attention_interval": 4, "head_dim": 256,
}  # fmt: skip
_MAMBA2: Mapping[str, Any] = {
    "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 256,
}  # fmt: skip
_LFM2: Mapping[str, Any] = {
    "mlp_module": "feed_forward", "mlp": ("w1", "w3", "w2"), "mlp_kept": 4, "last_norm": "embedding_norm",
    "wide_norms": ("operator_norm", "ffn_norm"), "head_norms": True, "recurrent": RecurrentForm("conv", "conv"),
}  # fmt: skip
_LFM3_TYPES = ["conv", "conv", "full_attention", "conv"] + ["sliding_attention", "conv", "full_attention", "conv"] * 63

HYBRID: Mapping[str, Family] = {
    "qwen3_next": Family(
        sizes(151936, 2048, 5632, 48, 16, 2, **_DELTA, moe_intermediate_size=512, num_experts=512,
              shared_expert_intermediate_size=512, num_experts_per_tok=10, decoder_sparse_step=1),
        **BIASES, head_norms=True, gate="doubled", joined_rotary=True, experts=_SHARED_GATED,
        recurrent=RecurrentForm("delta_fused", "linear_attn"),
    ),
    "qwen3_5_text": Family(
        sizes(248320, 4096, 12288, 32, 16, 4, **_DELTA), **BIASES, head_norms=True, gate="doubled", joined_rotary=True,
        recurrent=RecurrentForm("delta", "linear_attn"),
    ),
    "qwen3_5_moe_text": Family(
        sizes(248320, 2048, 5632, 40, 16, 2, **_DELTA, moe_intermediate_size=512, num_experts=256,
              shared_expert_intermediate_size=512, num_experts_per_tok=8),
        **BIASES, head_norms=True, gate="doubled", joined_rotary=True, experts=_SHARED_GATED,
        recurrent=RecurrentForm("delta", "linear_attn"),
    ),
    "olmo_hybrid": Family(
        sizes(100352, 3840, 11008, 32, 30, 30, **{**_DELTA, 
            "head_dim": 128, "linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_key_head_dim": 96,
            "linear_value_head_dim": 192}),
        **BIASES, flat_norms=True, wide_norms=AFTER, recurrent=RecurrentForm("delta_split", "linear_attn"),
    ),
    "kimi_linear": Family(
        sizes(163840, 2304, 9216, 27, 32, 32, moe_intermediate_size=1024, num_experts=256, num_shared_experts=1,
              num_experts_per_token=8, first_k_dense_replace=1, kv_lora_rank=512, qk_rope_head_dim=64,
              qk_nope_head_dim=128, v_head_dim=128, linear_head_dim=128, linear_num_heads=32,
              linear_conv_kernel_dim=4, full_attn_idxs=[*range(4, 256, 4)]),
        latent=True, joined_rotary=True, qkv_bias="attention_bias", experts=ExpertForm(shared="shared_experts"),
        recurrent=RecurrentForm("kda", "self_attn"),
    ),
    "nemotron_h": Family(
        sizes(131072, 4096, 21504, 52, 32, 8, head_dim=128, mamba_num_heads=128, mamba_head_dim=64, n_groups=8,
              ssm_state_size=128, conv_kernel=4, chunk_size=128, moe_intermediate_size=7688, n_routed_experts=8,
              n_shared_experts=1, num_experts_per_tok=2, moe_shared_expert_intermediate_size=7688,
              layers_block_type=["linear_attention", "moe", "full_attention", "mlp"]),
        **BIASES, embedding="embeddings", last_norm="norm_f", attention="mixer", mlp_module="mixer", mlp=UP_DOWN,
        mlp_bias="mlp_bias", gated=False, mlp_kept=2, wide_norms=("norm",), one_part=True,
        experts=ExpertForm(module="mixer", gated=False, kept=1, shared="shared_experts",
                           shared_width="moe_shared_expert_intermediate_size"),
        recurrent=RecurrentForm("mamba2", "mixer"),
    ),
    "falcon_h1": Family(
        sizes(128000, 4096, 14336, 32, 32, 8, **_MAMBA2, mamba_d_ssm=1024, mamba_rms_norm=False),
        **BIASES, mlp_module="feed_forward", mlp_bias="mlp_bias", wide_norms=_FEED_NORMS, scaled=True,
        last_norm="final_layernorm", recurrent=RecurrentForm("mamba2", "mamba", beside_attention=True),
    ),
    "bamba": Family(
        sizes(128000, 4096, 14336, 32, 32, 8, **_MAMBA2), **BIASES, mlp_module="feed_forward", mlp_bias="mlp_bias",
        wide_norms=_FEED_NORMS, last_norm="final_layernorm", recurrent=RecurrentForm("mamba2", "mamba"),
        joined_rotary=True,
    ),
    "granitemoehybrid": Family(
        sizes(32000, 4096, 11008, 32, 32, 32, **_MAMBA2, num_local_experts=8, num_experts_per_tok=2,
              shared_intermediate_size=1024),
        **BIASES, scaled=True, mlp_module="shared_mlp", mlp=("input_linear", "output_linear"), mlp_kept=4,
        mlp_width="shared_intermediate_size", recurrent=RecurrentForm("mamba2", "mamba"),
        experts=ExpertForm(width="intermediate_size", module="block_sparse_moe", shared="shared_mlp",
                           shared_width="shared_intermediate_size"),
    ),
    "jamba": Family(
        sizes(65536, 4096, 14336, 32, 32, 8, num_experts=16, num_experts_per_tok=2, expert_layer_period=2,
              expert_layer_offset=1, attn_layer_period=8, attn_layer_offset=4, mamba_d_state=16, mamba_d_conv=4,
              mamba_expand=2),
        mlp_module="feed_forward", wide_norms=_FEED_NORMS, last_norm="final_layernorm",
        experts=ExpertForm(width="intermediate_size", module="feed_forward"),
        recurrent=RecurrentForm("mamba", "mamba"),
    ),
    "lfm2": Family(
        sizes(65536, 2560, 12288, 32, 32, 8, conv_L_cache=3, block_multiple_of=256, block_ffn_dim_multiplier=1.0,
              block_auto_adjust_ff_dim=True, tie_word_embeddings=True, full_attn_idxs=[*range(32)]),
        projections=("q_proj", "k_proj", "v_proj", "out_proj"), **_LFM2,
    ),
    "lfm2_moe": Family(
        sizes(65536, 2048, 7168, 32, 32, 8, conv_L_cache=3, moe_intermediate_size=1792, num_dense_layers=2,
              num_experts=32, num_experts_per_tok=4, tie_word_embeddings=True),
        projections=("q_proj", "k_proj", "v_proj", "out_proj"), **_LFM2,
        experts=ExpertForm(module="feed_forward"),
    ),
    "lfm3": Family(
        sizes(128000, 2048, 7680, 24, 16, 4, conv_L_cache=7, head_dim=128, sliding_window=256,
              tie_word_embeddings=True, layer_types=_LFM3_TYPES),
        **{**_LFM2, "wide_norms": ("operator_norm", "ffn_norm", "post_operator_norm", "post_ffn_norm")},
        qkv_bias="attention_bias", output_bias="attention_bias", gate="heads", gate_name="g_proj", window=True,
    ),
}  # fmt: skip
