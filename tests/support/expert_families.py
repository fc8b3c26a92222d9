"""Tiny mixtures of experts of every layout in transformers, saved as published checkpoints are."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.tiny_models import COMMON, GQA, byte_tokenizer

EXPERTS, VISITED = 4, 2
MLA: dict[str, Any] = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
MLA |= {"v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": EXPERTS, "num_experts_per_tok": VISITED}
MLA |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "moe_intermediate_size": 32}
ROUTED: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": VISITED, "moe_intermediate_size": 32}
LOCAL: dict[str, Any] = {"num_local_experts": EXPERTS, "num_experts_per_tok": VISITED, **GQA}
HYBRID: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
HYBRID |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}

# model_type -> settings in addition to COMMON. The comment says what is special.
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**ROUTED, **GQA},  # gate, up and down of each expert on disk, fused in memory
    "qwen2_moe": {**ROUTED, "num_key_value_heads": 2, "shared_expert_intermediate_size": 48},  # shared expert, its gate
    "mixtral": LOCAL,  # w1, w3, w2
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": VISITED, "num_key_value_heads": 2},
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": VISITED, "num_key_value_heads": 2},  # biases
    "gpt_oss": {**LOCAL, "sliding_window": 32},  # fused, transposed, interleaved, biased; attention sinks
    "glm4_moe": {**MLA, **GQA, "num_key_value_heads": 2},  # dense first layer, correction bias
    "glm4_moe_lite": MLA,  # multi-head latent attention
    "deepseek_v2": {**MLA, "topk_method": "greedy"},
    "deepseek_v3": MLA,
    "granitemoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": VISITED, "num_key_value_heads": 2},  # fused
    "minimax_m2": {**LOCAL, "rotary_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_k": VISITED, "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
        "num_key_value_heads": 2, "moe_layer_start_index": 1,
    },
    "gemma4_text": {  # dense and sparse side by side; shared K/V; per-layer embeddings
        **GQA, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": VISITED, "moe_intermediate_size": 32,
        "sliding_window": 32, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 384, "num_kv_shared_layers": 1, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "qwen3_next": {**ROUTED, **GQA, **HYBRID, "shared_expert_intermediate_size": 48},
    "qwen3_5_moe_text": {**ROUTED, **GQA, **HYBRID, "shared_expert_intermediate_size": 48},
    "nemotron_h": {  # experts without a gate, Mamba2
        "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": EXPERTS, "num_experts_per_tok": VISITED,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "chunk_size": 16, "num_hidden_layers": 4,
    },
    "lfm2_moe": {  # short convolutions
        **ROUTED, "num_key_value_heads": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
    },
    "jamba": {
        "num_experts": EXPERTS, "num_experts_per_tok": VISITED, "num_key_value_heads": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "dots1": {**MLA, **GQA, "num_key_value_heads": 2},
    "mellum": {**ROUTED, **GQA},
    "afmoe": {**ROUTED, **GQA, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 32},
    "llama4_text": {**LOCAL, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},  # in no registry
}  # fmt: skip


def expert_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    return AutoConfig.for_model(family, **(COMMON | EXPERT_FAMILIES[family] | changes))


def save_family(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of `family` and a byte tokenizer to `folder`; routers spread tokens over all experts."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(expert_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
