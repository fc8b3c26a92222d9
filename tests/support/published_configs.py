"""The config.json of newer published models, as far as the planner reads it: hybrids, mixtures of experts, wrappers.

Sources: the defaults of transformers' configuration classes, which are those of a published model (`{}` beyond the
model_type), and model cards or conversion scripts of Qwen, Google, Mistral AI, NVIDIA, IBM, Liquid AI and others.
"""

from typing import Any

BF16 = {"dtype": "bfloat16"}


def _qwen35(hidden: int, mlp: int, layers: int, heads: int, value_heads: int, tied: bool) -> dict[str, Any]:
    """A wrapper of Qwen3.5 and 3.6: the text model beside a vision tower."""
    text = {
        "model_type": "qwen3_5_text", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 4, "linear_num_value_heads": value_heads,
        "tie_word_embeddings": tied, **BF16,
    }  # fmt: skip
    return {"model_type": "qwen3_5", "tie_word_embeddings": tied, "text_config": text, "vision_config": QWEN_VISION}


def _gemma4(hidden: int, mlp: int, layers: int, heads: tuple[int, int], **others: Any) -> dict[str, Any]:
    text = {
        "model_type": "gemma4_text", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "final_logit_softcapping": 30.0, **BF16,
    }  # fmt: skip
    return {"model_type": "gemma4", "text_config": text | others, "vision_config": GEMMA_VISION}


def _types(pattern: str, layers: int) -> list[str]:
    """`layer_types` of a pattern of letters that repeats."""
    names = {"s": "sliding_attention", "f": "full_attention", "m": "mamba", "a": "attention", "c": "conv"}
    return [names[pattern[layer % len(pattern)]] for layer in range(layers)]


QWEN_VISION = {"model_type": "qwen3_5", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
GEMMA_VISION = {"model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
GLOBAL = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024}
LFM2_8B = "ccfcccfcccfcccfccfccfcc"
GRANITE = "mmmmmammmmmmmmmammmmmmmmmammmmmmmmmammmm"

NEW_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3.5-4B": _qwen35(2560, 9216, 32, 16, 32, tied=True),
    "Qwen3.5-9B": _qwen35(4096, 12288, 32, 16, 32, tied=False),
    "Qwen3.6-27B": _qwen35(5120, 17408, 64, 24, 48, tied=False),
    "Qwen3.6-35B-A3B": {
        "model_type": "qwen3_5_moe", "tie_word_embeddings": False, "vision_config": QWEN_VISION,
        "text_config": {"model_type": "qwen3_5_moe_text", **BF16},
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128, "num_experts": 128, **BF16,
    },
    "Qwen3-Next-80B-A3B": {"model_type": "qwen3_next", **BF16},
    "Qwen1.5-MoE-A2.7B": {"model_type": "qwen2_moe", **BF16},
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, **BF16},
    "gpt-oss-120b": {"model_type": "gpt_oss", **BF16},
    "Gemma-4-E2B": _gemma4(1536, 6144, 35, (8, 1), num_kv_shared_layers=20, use_double_wide_mlp=True,
                           layer_types=_types("ssssf", 35)),
    "Gemma-4-E4B": _gemma4(2560, 10240, 42, (8, 2), num_kv_shared_layers=18),
    "Gemma-4-12B": {
        "model_type": "gemma4_unified",
        "text_config": {
            "model_type": "gemma4_unified_text", "hidden_size": 3840, "intermediate_size": 15360,
            "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "attention_k_eq_v": True,
            "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0, **BF16,
        },
    },
    "Gemma-4-26B-A4B": _gemma4(2816, 2112, 30, (16, 8), **GLOBAL, num_global_key_value_heads=2, num_experts=128,
                               enable_moe_block=True, top_k_experts=8, moe_intermediate_size=704),
    "Gemma-4-31B": _gemma4(5376, 21504, 60, (32, 16), **GLOBAL, num_global_key_value_heads=4),
    "Gemma-3n-E4B": {"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text", **BF16}},
    "Mistral-Small-3.2-24B": {
        "model_type": "mistral3", "vision_config": {"model_type": "pixtral"}, "tie_word_embeddings": False,
        "text_config": {
            "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
            "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "sliding_window": None, "tie_word_embeddings": False, **BF16,
        },
    },
    "GLM-4.7-Flash": {"model_type": "glm4_moe_lite", **BF16},
    "GLM-4.5-Air": {"model_type": "glm4_moe", "head_dim": 128, "attention_bias": True, **BF16},
    "Mixtral-8x7B": {"model_type": "mixtral", **BF16},
    "OLMoE-1B-7B": {"model_type": "olmoe", "intermediate_size": 1024, **BF16},
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408, "q_lora_rank": None,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, **BF16,
    },
    "DeepSeek-V3": {"model_type": "deepseek_v3", **BF16},
    "Nemotron-3-Nano-30B-A3B": {
        "model_type": "nemotron_h", "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2,
        "head_dim": 128, "intermediate_size": 1856, "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8,
        "ssm_state_size": 128, "conv_kernel": 4, "n_routed_experts": 128, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_shared_experts": 1,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", **BF16,
    },
    "OLMo-Hybrid-7B": {"model_type": "olmo_hybrid", **BF16},
    "Kimi-Linear-48B-A3B": {
        "model_type": "kimi_linear", **BF16, "linear_attn_config": {
            "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
            "kda_layers": [layer for layer in range(1, 27) if layer % 4],
        },
    },
    "Falcon-H1-7B": {
        "model_type": "falcon_h1", "vocab_size": 130049, "hidden_size": 3072, "intermediate_size": 12288,
        "num_hidden_layers": 44, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
        "mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128, "mamba_d_state": 256, **BF16,
    },
    "Granite-4.0-H-Tiny": {
        "model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": 1536, "intermediate_size": 512,
        "num_hidden_layers": 40, "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64,
        "num_experts_per_tok": 6, "shared_intermediate_size": 1024, "mamba_n_heads": 48, "mamba_d_head": 64,
        "mamba_d_state": 128, "layer_types": _types(GRANITE, 40), "tie_word_embeddings": True, **BF16,
    },
    "Jamba-v0.1": {"model_type": "jamba", **BF16},
    "LFM2-8B-A1B": {
        "model_type": "lfm2_moe", "num_hidden_layers": 24, "layer_types": _types(LFM2_8B + "c", 24), **BF16,
    },
    "Mellum2-12B-A2.5B": {"model_type": "mellum", "layer_types": _types("f", 28), **BF16},
    "Seed-OSS-36B": {"model_type": "seed_oss", "hidden_size": 5120, **BF16},
    "Apertus-8B": {"model_type": "apertus", "intermediate_size": 21504, "num_key_value_heads": 8, **BF16},
    "SmolLM3-3B": {"model_type": "smollm3", **BF16},
    "Phi-3.5-MoE": {"model_type": "phimoe", "attention_bias": True, "lm_head_bias": True, **BF16},
    "ERNIE-4.5-21B-A3B": {"model_type": "ernie4_5_moe", **BF16},
}  # fmt: skip
