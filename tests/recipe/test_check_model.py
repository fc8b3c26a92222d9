"""`check` runs a model's class with random weights, at its real shapes, in little memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.architectures import tiny_config
from support.small_runs import recipe_of
from transformers import BartConfig, Gemma3TextConfig, LlamaConfig

from qlora.model.random_weights import shortened
from qlora.recipe.check_model import LAYERS, Structure, structure_of

MAX_BYTES = 2**28


def structure(config: Any, folder: Path) -> Structure:
    config.save_pretrained(folder)
    return structure_of(recipe_of(folder, folder / "rows", folder / "run", "model.dtype=bfloat16"))


def storages(model: torch.nn.Module) -> Iterator[tuple[int, int]]:
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def test_seventy_billion_weights_take_little_memory(tmp_path: Path) -> None:
    shapes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "vocab_size": 128_256}
    config = LlamaConfig(**shapes, num_attention_heads=64, num_key_value_heads=8)
    result = structure(config, tmp_path)
    assert result.rows == 128_256 and len(result.linears) == 560 and result.left_out == {} and result.notes == ()
    assert result.linears[-1] == "model.layers.79.mlp.down_proj"
    assert sum(dict(storages(result.trial)).values()) < MAX_BYTES
    layer = result.trial.model.layers[0].mlp.down_proj
    assert (layer.out_features, layer.in_features) == (8192, 28_672)


def test_a_tied_head_and_windows_of_a_large_vocabulary(tmp_path: Path) -> None:
    shapes = {"hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48, "vocab_size": 262_208}
    config = Gemma3TextConfig(**shapes, num_attention_heads=16, num_key_value_heads=8, head_dim=256)
    result = structure(config, tmp_path)
    assert result.notes == () and len(result.linears) == 48 * 7
    assert sum(dict(storages(result.trial)).values()) < MAX_BYTES


def test_layers_that_text_does_not_reach_are_left_out_of_every_layer(tmp_path: Path) -> None:
    config = BartConfig(**tiny_config("bart").to_dict() | {"decoder_layers": 9, "num_hidden_layers": 9})
    result = structure(config, tmp_path)
    unused = [path for path in result.left_out if "encoder_attn" in path]
    assert len(unused) == 9 * 4 and not any("encoder_attn" in path for path in result.linears)
    assert len(result.linears) == 9 * 6


def test_a_configuration_is_shortened_with_its_lists() -> None:
    config = tiny_config("gemma3_text", {"num_hidden_layers": 12, "layer_types": ["sliding_attention"] * 12})
    short = shortened(config, LAYERS)
    assert short.num_hidden_layers == len(short.layer_types) == LAYERS
    assert config.num_hidden_layers == 12 and shortened(short, LAYERS) is None
