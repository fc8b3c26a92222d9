"""Shapes from config.json equal those of transformers' models, weight by weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.errors import BaseModelError
from qlora.memory.planner.architectures import FAMILIES as ARCHITECTURES
from qlora.memory.planner.config_reader import read, shapes_of
from qlora.model.linear_layers import linear_paths

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
    "qwen3-tied-with-bias": {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
    "phi3-grouped": {"model_type": "phi3", "num_key_value_heads": 8, "hidden_size": 5120, "num_attention_heads": 40},
}  # fmt: skip
MODEL_TYPES = tuple(ARCHITECTURES)


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def assert_equal_shapes(fields: dict[str, Any], config: Any) -> None:
    model, shapes = meta_model(config), shapes_of(fields, "model")
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = {path: model.get_submodule(path) for path in linear_paths(model)}
    assert sorted(matrix.path for matrix in shapes.matrices) == sorted(linears)  # Phi-3 lists its output first
    for matrix in shapes.matrices:
        linear = linears[matrix.path]
        assert (matrix.out_features, matrix.in_features) == tuple(linear.weight.shape), matrix.path
        assert matrix.bias == (linear.bias is not None), matrix.path
    inside = {id(parameter) for linear in linears.values() for parameter in linear.parameters()}
    norms = [value for name, value in model.named_parameters() if "norm" in name and "vision" not in name]
    assert shapes.norms == sum(value.numel() for value in norms if id(value) not in inside) - projector_norm(model)


def projector_norm(model: Any) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if "soft_emb_norm" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_tiny_model_is_counted(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    config.save_pretrained(tmp_path)
    assert_equal_shapes(json.loads((tmp_path / "config.json").read_text()), config)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_every_weight_of_a_published_model_is_counted(fields: dict[str, Any]) -> None:
    assert_equal_shapes(fields, AutoConfig.for_model(**fields))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_missing_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    assert_equal_shapes({"model_type": model_type}, AutoConfig.for_model(model_type))


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": "torch.float16"}])
def test_the_dtype_is_read_from_both_of_its_keys(fields: dict[str, Any]) -> None:
    assert shapes_of({"model_type": "llama", **fields}, "model").dtype == "float16"


@pytest.mark.parametrize("change, word", [
    ({"model_type": "qwen3_moe"}, "Did you mean 'qwen3'"), ({"model_type": None}, "model_type"),
    ({"hidden_size": "4096"}, "hidden_size"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"vocab_size": True}, "vocab_size"), ({"head_dim": -1}, "head_dim"),
    ({"model_type": "gemma3", "text_config": 1}, "text_config"),
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
