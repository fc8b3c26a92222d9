"""Tiny random models of every class that AutoModelForCausalLM builds, from each configuration's own fields."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.tiny_models import CHATML, byte_tokenizer

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 384),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 96),
    **dict.fromkeys(("embedding_size", "d_inner", "ffn_hidden_size", "dim_ff", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings", "max_seq_len", "max_sequence_length"), 256),
    "image_size": 32, "patch_size": 16, "depth": 2, "projection_dim": 32,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_expand": 2}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SPARSE_DELTA = {**GATED_DELTA, **FEW_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
                "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
ENCODER = {"is_decoder": True}
OVERRIDES: dict[str, dict[str, Any]] = {  # what the sizes alone do not make consistent
    "bamba": {**MAMBA, "attn_layer_indices": [1], "attn_rotary_emb": 16},
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), ENCODER),
    **dict.fromkeys(("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm"), ENCODER),
    **dict.fromkeys(("roformer", "xlm-roberta", "xlm-roberta-xl"), ENCODER),
    "xmod": {**ENCODER, "default_language": "en_XX"},
    "codegen": {"rotary_dim": 8},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    "minicpm3": {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
                 "qk_rope_head_dim": 16, "v_head_dim": 16, "dim_model_base": 32},
    "youtu": {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
              "qk_rope_head_dim": 16, "v_head_dim": 16},
    "qwen3_5_text": {**GATED_DELTA, "layer_types": ["linear_attention", "full_attention"]},
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text", "lara_mini"), SPARSE_DELTA),
    "granitemoehybrid": {**MAMBA, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96,
                         "layer_types": ["mamba", "attention"]},
    "jamba": {"mamba_d_state": 16, "attn_layer_period": 2, "attn_layer_offset": 1, **FEW_EXPERTS},
    "kimi_linear": {**LATENT, **FEW_EXPERTS, "num_experts_per_token": 2, "moe_intermediate_size": 32,
                    "linear_head_dim": 16, "linear_num_heads": 4, "num_key_value_heads": 4,
                    "layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 32,
                   "num_hidden_layers": 3, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16,
                   "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "n_routed_experts": 4},
    "lfm2_moe": {**FEW_EXPERTS, "moe_intermediate_size": 32, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "attention_head_size": 16, "axial_pos_shape": [16, 16],
                 "axial_pos_embds_dim": [32, 32], "num_buckets": 2, "lsh_attn_chunk_length": 16,
                 "local_attn_chunk_length": 16, "feed_forward_size": 96},
    "rembert": {**ENCODER, "input_embedding_size": 64, "output_embedding_size": 64},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
                     "laurel_rank": 8, "hidden_size_per_layer_input": 16, "altup_num_inputs": 2},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "roc_bert": {**ENCODER, "pronunciation_vocab_size": 64, "shape_vocab_size": 64, "pronunciation_embed_dim": 32,
                 "shape_embed_dim": 32},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "attention_hidden_size": 128,
              "attention_head_dim": 32, "mamba_d_state": 16, "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 4, "num_mem_blocks": 2, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
               "mamba_d_state": 16, "n_mamba_heads": 4, "mamba_headdim": 32, "mamba_ngroups": 1, "chunk_size": 16},
}  # fmt: skip


EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_layer_start_index", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
}


def expert_settings(kind: str) -> dict[str, Any]:
    """Few small experts, in the fields that the configuration of `kind` has."""
    config = tiny_config(kind)
    return {name: value for name, value in EXPERTS.items() if hasattr(config, name)}


def tiny_config(kind: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The configuration of `kind` with small sizes; every other field keeps its default."""
    config_class = CONFIG_MAPPING[kind]
    return config_class(**_small_values(config_class) | OVERRIDES.get(kind, {}) | dict(overrides or {}))


def _small_values(config_class: Any) -> dict[str, Any]:
    """Small values of the fields that a configuration class has, nested configurations included."""
    fields = set(inspect.signature(config_class.__init__).parameters)
    fields |= {name for base in config_class.__mro__ for name in vars(base).get("__annotations__", {})}
    values = {name: value for name, value in SIZES.items() if name in fields}
    nested = getattr(config_class, "sub_configs", {})
    defaults = config_class() if nested else None
    for name in nested:
        kind = type(getattr(defaults, name))
        if hasattr(kind, "sub_configs"):
            values[name] = kind(**_small_values(kind)).to_dict()
    return values


def parameter_count(config: Any) -> int:
    """Parameters of the class's model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


@torch.no_grad()
def random_model(kind: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The class's model with random weights, norms and stored buffers, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, overrides), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            parameter.normal_(0, 0.15)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for buffer in (b for name, b in model.named_buffers() if name in model.state_dict() and b.is_floating_point()):
        buffer.add_(torch.randn_like(buffer) * 0.05)
    return model.eval()


def save_with_tokenizer(model: Any, folder: Path, chat_template: str | None = CHATML) -> Path:
    """Write a model and a byte tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


def save_architecture(folder: Path, kind: str, max_parameters: int, overrides: Mapping[str, Any] | None = None) -> Path:
    """Write a random model of `kind` and a byte tokenizer. ValueError if even the tiny model is too large."""
    size = parameter_count(tiny_config(kind, overrides))
    if size > max_parameters:
        raise ValueError(f"{size:,} parameters")
    return save_with_tokenizer(random_model(kind, overrides), folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
