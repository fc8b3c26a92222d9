"""Rows and keys of GGUF files are llama.cpp's: what a round trip through our own reader would not show.

Expected values are computed as in llama.cpp's converter (b11669, `conversion/`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import COMMON, GQA
from torch import Tensor
from transformers import models as classes

from qlora.exporters.gguf.gguf_architectures import ARCHITECTURES
from qlora.exporters.gguf.metadata import architecture_metadata, rope_divisors
from qlora.exporters.gguf.tensor_layout import placements, row_changes
from qlora.model.meta_model import build_meta_model

gguf = pytest.importorskip("gguf")
HEADS, SIZE, WIDTH = 4, 8, 6
MATRIX = torch.arange(HEADS * 3 * SIZE * WIDTH, dtype=torch.float32).view(-1, WIDTH)
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": lambda: classes.llama.LlamaConfig(**COMMON, **GQA, rope_parameters=LLAMA3),
    "Gemma3ForCausalLM": lambda: classes.gemma3.Gemma3TextConfig(**COMMON, **GQA, query_pre_attn_scalar=16),
    "GraniteForCausalLM": lambda: classes.granite.GraniteConfig(**COMMON, num_key_value_heads=2),
    "Phi3ForCausalLM": lambda: classes.phi3.Phi3Config(**COMMON, num_key_value_heads=2),
    "GPTNeoXForCausalLM": lambda: classes.gpt_neox.GPTNeoXConfig(**COMMON),
    "Qwen3MoeForCausalLM": lambda: classes.qwen3_moe.Qwen3MoeConfig(
        **COMMON, **GQA, **EXPERTS, num_experts=4, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "GptOssForCausalLM": lambda: classes.gpt_oss.GptOssConfig(
        **COMMON, **GQA, **EXPERTS, num_local_experts=4, sliding_window=32
    ),
}


def known_keys(section: type, name: str) -> set[str]:
    """The keys in a class of the package's constants and in the classes inside it."""
    values = [value for key, value in vars(section).items() if not key.startswith("_")]
    keys = {value.replace("{arch}", name) for value in values if isinstance(value, str)}
    return keys.union(*(known_keys(value, name) for value in values if isinstance(value, type)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_one_of_llama_cpps(name: str) -> None:
    architecture = ARCHITECTURES[name]
    metadata = architecture_metadata(architecture, CONFIGS[name]())
    assert metadata.keys() <= known_keys(gguf.Keys, architecture.name)
    if name == "Gemma3ForCausalLM":
        assert metadata["gemma3.rope.freq_base"] == 1e6 and metadata["gemma3.rope.freq_base_swa"] == 1e4


def changed(name: str, matrix: str, values: Tensor) -> Tensor:
    config = classes.llama.LlamaConfig(num_attention_heads=HEADS, hidden_size=HEADS * SIZE)
    change, undo = row_changes(ARCHITECTURES[name], config, f"model.layers.0.{matrix}.weight")
    assert torch.equal(undo(change(values)), values)
    return change(values)


def test_rows_are_in_the_converters_order() -> None:
    one = MATRIX[: HEADS * SIZE]
    permuted = one.reshape(HEADS, 2, SIZE // 2, WIDTH).swapaxes(1, 2).reshape(one.shape)  # LlamaModel.permute
    for name in ("LlamaForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM"):
        assert torch.equal(changed(name, "self_attn.q_proj", one), permuted)
        assert torch.equal(changed(name, "self_attn.v_proj", one), one)
    assert torch.equal(changed("Qwen3ForCausalLM", "self_attn.q_proj", one), one)
    by_head = MATRIX.reshape(HEADS, 3, SIZE, WIDTH)  # GPTNeoXModel.modify_tensors
    split = torch.cat([by_head[:, part].reshape(-1, WIDTH) for part in range(3)])
    assert torch.equal(changed("GPTNeoXForCausalLM", "attention.query_key_value", MATRIX), split)


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_norms_of_gemma_have_one_added(name: str) -> None:
    values = torch.tensor([0.5, -0.25])
    assert torch.equal(changed(name, "input_layernorm", values), values + 1)
    assert torch.equal(changed(name, "self_attn.q_proj", values), values)


@pytest.mark.parametrize(("name", "alternate"), [("Qwen3MoeForCausalLM", False), ("GptOssForCausalLM", True)])
def test_gate_and_up_of_experts_are_the_rows_that_the_class_reads(name: str, alternate: bool) -> None:
    model = build_meta_model(CONFIGS[name](), torch.float32, "auto", torch.device("cpu"))
    by_name = {place.name: place for place in placements(ARCHITECTURES[name], model)}
    values = torch.arange(64.0)[:, None].expand(64, 2)
    gate, up = (by_name[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up"))
    expected = (values[::2], values[1::2]) if alternate else (values[:32], values[32:])
    assert torch.equal(gate.part(values), expected[0]) and torch.equal(up.part(values), expected[1])
    assert torch.equal(gate.join([gate.part(values), up.part(values)]), values)


def test_divisors_of_frequencies_are_the_converters() -> None:
    config = CONFIGS["LlamaForCausalLM"]()
    divisors, expected = rope_divisors(config), []
    size = config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim
    for exponent in range(0, size, 2):  # LlamaModel.generate_extra_tensors
        wavelength = 2 * torch.pi * 10_000.0 ** (exponent / size)
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        middle = 1 / ((1 - smooth) / 8.0 + smooth)
        expected.append(1.0 if wavelength < 64 / 4.0 else 8.0 if wavelength > 64 / 1.0 else middle)
    assert divisors is not None
    torch.testing.assert_close(divisors, torch.tensor(expected), rtol=1e-6, atol=0)
