"""Tiny random models of every layout of experts, saved in transformers' format."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import models as zoo

from qlora.adapters.inject import adapted, adapted_experts
from support.tiny_models import VOCABULARY, byte_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
GROUPED = {"n_group": 1, "topk_group": 1}
EXPERTS: Mapping[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: zoo.qwen3_moe.Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=24),
    "qwen3_moe_square": lambda: zoo.qwen3_moe.Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=32),
    "mixtral": lambda: zoo.mixtral.MixtralConfig(**COMMON, num_local_experts=4),
    "olmoe": lambda: zoo.olmoe.OlmoeConfig(**COMMON, num_experts=4),
    # A first dense layer and a shared expert, whose matrices have the names of experts.
    "qwen2_moe": lambda: zoo.qwen2_moe.Qwen2MoeConfig(
        **COMMON, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40, mlp_only_layers=[0]
    ),
    "glm4_moe": lambda: zoo.glm4_moe.Glm4MoeConfig(
        **COMMON, **GROUPED, n_routed_experts=4, moe_intermediate_size=24, n_shared_experts=1, first_k_dense_replace=1
    ),
    "gpt_oss": lambda: zoo.gpt_oss.GptOssConfig(**COMMON, num_local_experts=4),
    "nemotron_h": lambda: zoo.nemotron_h.NemotronHConfig(
        **COMMON, **GROUPED, n_routed_experts=4, moe_intermediate_size=24, moe_shared_expert_intermediate_size=40,
        layers_block_type=["attention", "moe"], moe_latent_size=None,
    ),
}  # fmt: skip


def randomize_updates(model: nn.Module) -> None:
    """B of every adapted layer and expert far from where it starts, the same for every call."""
    for number, layer in enumerate([*adapted(model).values(), *adapted_experts(model).values()]):
        nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))


def save_expert_model(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random model of experts and a byte tokenizer to `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(EXPERTS[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
