"""Shapes from config.json equal those of transformers' models, weight by weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published_configs import NEW_CONFIGS
from support.tiny_models import FAMILIES
from transformers import AutoConfig

from qlora.errors import BaseModelError
from qlora.memory.planner.architectures import FAMILIES as ARCHITECTURES
from qlora.memory.planner.config_reader import read, shapes_of
from qlora.memory.planner.shapes import Shapes
from qlora.model.expert_forward import expert_stacks, replace_experts
from qlora.model.linear_layers import linear_paths
from qlora.model.wrapper_models import build_class

OTHERS: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma", "num_hidden_layers": 2},
    "gemma3-with-vision": {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 6}},
    "gemma3-vision-as-published": {
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 6},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 896,
                          "num_hidden_layers": 3, "patch_size": 14, "vision_use_head": False},
    },
    "neox-without-attention-bias": {"model_type": "gpt_neox", "attention_bias": False, "num_hidden_layers": 2},
    "qwen3-tied-with-bias": {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True,
                             "num_hidden_layers": 2},
    "phi3-grouped": {"model_type": "phi3", "num_key_value_heads": 8, "hidden_size": 5120, "num_attention_heads": 40,
                     "num_hidden_layers": 2},
    "qwen3-moe-with-dense-layers": {"model_type": "qwen3_moe", "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "granite-shared": {"model_type": "granitemoeshared", "shared_intermediate_size": 96, "num_hidden_layers": 2},
    "jamba-dense": {"model_type": "jamba", "num_experts": 1, "num_hidden_layers": 5, "mamba_proj_bias": True},
    "bamba-attention": {"model_type": "bamba", "attn_layer_indices": [1], "num_hidden_layers": 2},
    "starcoder2-window": {"model_type": "starcoder2", "num_hidden_layers": 2, "sliding_window": 4096},
    "mistral-small": {"model_type": "mistral3", "text_config": {"model_type": "mistral", "num_hidden_layers": 2}},
}  # fmt: skip
# Layers that a configuration needs beyond two, so that every kind of its layers is among them.
LAYERS = {
    "gemma3n_text": 35, "gemma4_text": 6, "gemma4_unified_text": 6, "granitemoehybrid": 2, "jamba": 5, "lfm3": 5,
    "kimi_linear": 5, "qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4, "olmo_hybrid": 4,
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {  # what a configuration class has no usable default for
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
    "ministral": {"head_dim": 128}, "hunyuan_v1_dense": {"head_dim": 128}, "nemotron_h": {"num_hidden_layers": None},
    "qwen3_next": {"num_experts": 8}, "qwen3_5_moe_text": {"num_experts": 8}, "kimi_linear": {"num_experts": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "deepseek_v3": {"num_hidden_layers": 4},
}  # fmt: skip


def meta_model(config: Any) -> Any:
    """The class's model on `meta` with a module for every expert, as the loader builds it."""
    with torch.device("meta"):
        model = build_class(config, torch.float32, "eager")
    replace_experts(model)
    return model


def assert_equal_shapes(shapes: Shapes, config: Any) -> None:
    model = meta_model(config)
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())
    stacks = expert_stacks(model)
    inside = {f"{path}.{expert}" for path, stack in stacks.items() for expert in range(len(stack))}
    linears = {path: model.get_submodule(path) for path in linear_paths(model) if path not in inside}
    assert sorted(m.path for m in shapes.matrices) == sorted([*linears, *stacks])  # Phi-3 lists its output first
    for matrix in shapes.matrices:
        layer = stacks[matrix.path][0] if matrix.experts else linears[matrix.path]
        assert (matrix.out_features, matrix.in_features) == tuple(layer.weight.shape), matrix.path
        assert matrix.bias == (layer.bias is not None), matrix.path
        assert matrix.experts == (len(stacks[matrix.path]) if matrix.experts else 0), matrix.path


def shortened(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration with as few layers as show every kind."""
    model_type = fields["model_type"]
    return {"num_hidden_layers": LAYERS.get(model_type, 2), **fields, **NEEDED.get(model_type, {})}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_tiny_model_is_counted(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    config.save_pretrained(tmp_path)
    assert_equal_shapes(shapes_of(json.loads((tmp_path / "config.json").read_text()), "model"), config)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_every_weight_of_a_published_model_is_counted(fields: dict[str, Any]) -> None:
    assert_equal_shapes(shapes_of(fields, "model"), AutoConfig.for_model(**fields))


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name != "mistral4"])
def test_missing_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    fields = shortened({"model_type": model_type})
    fields = {key: value for key, value in fields.items() if value is not None}
    assert_equal_shapes(shapes_of(fields, "model"), AutoConfig.for_model(**fields))


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_number_of_layers_has_the_default_of_transformers(model_type: str) -> None:
    fields = {"model_type": model_type, **NEEDED.get(model_type, {})}
    if "layer_types" not in fields and model_type not in ("lfm2_moe",):
        config = AutoConfig.for_model(model_type)
        assert shapes_of({"model_type": model_type}, "model").layers == config.num_hidden_layers


PUBLISHED = {  # parameters, by the metadata of the published files
    "Qwen3-30B-A3B": 30_532_122_624, "OLMoE-1B-7B": 6_919_161_856, "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672, "Mixtral-8x7B": 46_702_792_704, "DeepSeek-V2-Lite": 15_706_484_224,
    "Seed-OSS-36B": 36_151_104_512, "Apertus-8B": 8_053_338_176, "SmolLM3-3B": 3_075_098_624,
    "Phi-3.5-MoE": 41_873_153_344, "Jamba-v0.1": 51_570_323_328, "Nemotron-3-Nano-30B-A3B": 31_577_937_344,
}  # fmt: skip
COUNTED = {  # parameters of transformers' class for text, without towers and further heads
    "Qwen3-Next-80B-A3B": 79_674_391_296, "ERNIE-4.5-21B-A3B": 21_825_437_888, "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen3.5-4B": 4_205_751_296, "Qwen3.5-9B": 8_953_803_264, "Qwen3.6-27B": 26_895_998_464,
    "Qwen3.6-35B-A3B": 34_660_610_688, "Gemma-4-E2B": 4_628_569_344, "Gemma-4-E4B": 7_463_013_376,
    "Gemma-4-12B": 11_907_350_272, "Gemma-4-26B-A4B": 25_233_141_760, "Gemma-4-31B": 30_697_345_280,
    "Gemma-3n-E4B": 6_835_235_568, "Mistral-Small-3.2-24B": 23_572_403_200, "GLM-4.7-Flash": 29_943_390_976,
    "GLM-4.5-Air": 106_852_245_504, "DeepSeek-V3": 671_026_404_352, "OLMo-Hybrid-7B": 7_430_870_688,
    "Kimi-Linear-48B-A3B": 49_122_675_072, "Falcon-H1-7B": 7_585_519_712, "Granite-4.0-H-Tiny": 6_939_037_248,
    "LFM2-8B-A1B": 8_339_929_856, "Mellum2-12B-A2.5B": 12_149_923_072,
}  # fmt: skip


@pytest.mark.parametrize("name", NEW_CONFIGS)
def test_parameters_of_published_models_are_exact(name: str) -> None:
    assert shapes_of(NEW_CONFIGS[name], name).parameters == (PUBLISHED | COUNTED)[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW_CONFIGS)
def test_every_weight_of_a_newer_published_model_is_counted(name: str) -> None:
    config = NEW_CONFIGS[name]
    assert_equal_shapes(shapes_of(config, name), AutoConfig.for_model(**config))


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": "torch.float16"}])
def test_the_dtype_is_read_from_both_of_its_keys(fields: dict[str, Any]) -> None:
    assert shapes_of({"model_type": "llama", **fields}, "model").dtype == "float16"


@pytest.mark.parametrize("change, word", [
    ({"model_type": "qwen3_mo"}, "Did you mean 'qwen3_moe'"), ({"model_type": None}, "model_type"),
    ({"hidden_size": "4096"}, "hidden_size"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"vocab_size": True}, "vocab_size"), ({"head_dim": -1}, "head_dim"),
    ({"model_type": "gemma3", "text_config": 1}, "text_config"), ({"model_type": "bert"}, "'bert'"),
])  # fmt: skip
def test_an_invalid_value_is_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(BaseModelError, match=word):
        shapes_of({"model_type": "llama", **change}, "model")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        read(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json"):
        read(tmp_path)
