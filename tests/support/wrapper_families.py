"""Tiny wrapper checkpoints: a text model with vision or audio towers, saved in transformers' format."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from support.tiny_models import COMMON, GQA, byte_tokenizer

TEXT = COMMON | GQA
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 16, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
}  # fmt: skip
HYBRID: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
HYBRID |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

# model_type -> settings of the text model in addition to TEXT
WRAPPER_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma4": {
        "model_type": "gemma4_text", "sliding_window": 32, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 384, "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral3": {"model_type": "mistral"},
    "qwen3_vl": {"model_type": "qwen3_vl_text", "rope_parameters": ROPE},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
    "qwen3_5": {"model_type": "qwen3_5_text", **HYBRID, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "glm4v": {"model_type": "glm4v_text", "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "internvl": {"model_type": "qwen2"},
}  # fmt: skip
VISION = {"gemma4": "gemma4_vision"}  # towers that the default configuration does not have


def save_wrapper(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random wrapper checkpoint of `family`, with a multi-token-prediction head that no class reads."""
    torch.manual_seed(seed)
    text = TEXT | WRAPPER_FAMILIES[family]
    tower: Any = (
        AutoConfig.for_model(VISION[family]) if family in VISION else AutoConfig.for_model(family).vision_config
    )
    settings = {name: value for name, value in TOWER.items() if hasattr(tower, name)}
    config = AutoConfig.for_model(family, text_config=text, vision_config=settings | {"model_type": tower.model_type})
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    extra = {"mtp.layers.0.mlp.up_proj.weight": torch.randn(8, 8).bfloat16()}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return folder
