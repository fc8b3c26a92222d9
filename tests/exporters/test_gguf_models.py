"""GGUF files of every architecture: read back they are the model; planted faults change it; others are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gguf_files import write_model_file
from support.tiny_models import COMMON, FAMILIES, GQA
from transformers import AutoModelForCausalLM
from transformers import models as classes

from qlora.data.types import Example
from qlora.errors import InputError, QloraError
from qlora.exporters.certificate import Agreement, compare
from qlora.exporters.gguf.gguf_architectures import ARCHITECTURES
from qlora.exporters.gguf.gguf_certificate import load_gguf
from qlora.exporters.gguf.gguf_file import GgufFile
from qlora.model.lazy_model import load_lazy_model

ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}
YARN = {**ROPE, "rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
CONFIGS: dict[str, Callable[[], Any]] = {
    **{name: FAMILIES[name] for name in ("llama", "llama-tied-bias", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")},
    **{name: FAMILIES[name] for name in ("granite", "gpt_neox")},
    "llama3": lambda: classes.llama.LlamaConfig(**COMMON, **GQA, rope_parameters=LLAMA3),
    "mistral": lambda: classes.mistral.MistralConfig(**COMMON, **GQA, sliding_window=None),
    "smollm3": lambda: classes.smollm3.SmolLM3Config(**COMMON, num_key_value_heads=2),
    "qwen3_moe": lambda: classes.qwen3_moe.Qwen3MoeConfig(**COMMON, **GQA, **EXPERTS),
    "gpt_oss": lambda: classes.gpt_oss.GptOssConfig(**COMMON, **GQA, **OSS, rope_parameters=YARN),
}
CPU = torch.device("cpu")


def save(folder: Path, config: Any) -> Path:
    """A model whose norms are not all ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = save(tmp_path_factory.mktemp(name), CONFIGS[name]())
        return folders[name]

    return make


def agreement(folder: Path, file: Path) -> Agreement:
    ids = np.random.default_rng(0).integers(0, 384, 64).astype(np.int32)
    trained = load_lazy_model(folder, torch.float32, "auto", CPU)
    return compare(trained, load_gguf(GgufFile(file), trained, "auto", CPU), [Example("one", ids, ids)], CPU)


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_read_back_is_the_model(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    result = agreement(folder_of(name), write_model_file(folder_of(name), tmp_path / "model.gguf"))
    assert result.top1 == 1.0
    assert result.max_logit_difference < 2e-4  # a norm of Gemma's is stored with 1 added


def test_every_architecture_of_the_table_is_tested() -> None:
    tested = {type(config()).__name__ for config in CONFIGS.values()}
    classes_of_table = {name.replace("ForCausalLM", "Config") for name in ARCHITECTURES if "Conditional" not in name}
    assert {name.replace("Gemma3Config", "Gemma3TextConfig") for name in classes_of_table} == tested


@pytest.mark.parametrize(("storage", "limit"), [("float16", 1e-5), ("bfloat16", 1e-3), ("q8_0", 1e-2), ("q4_0", 1.0)])
def test_fewer_bits_are_further_from_the_model(
    storage: str, limit: float, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_model_file(folder_of("llama"), tmp_path / "model.gguf", storage)
    assert 0 < agreement(folder_of("llama"), file).mean_kl < limit
    storages = GgufFile(file).storages()
    assert storages[{"float16": "f16", "bfloat16": "bf16"}.get(storage, storage)] >= 14
    if storage == "q4_0":
        assert storages["q8_0"] == 2  # embedding and head


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("llama", "blk.1.attn_q.weight", lambda values: values.roll(16, 0)),  # one head in another's place
        ("llama", "blk.0.attn_k.weight", lambda values: values.view(2, 8, 2, -1).transpose(1, 2).reshape(values.shape)),
        ("gemma2", "blk.1.ffn_norm.weight", lambda values: values - 1),
        ("qwen3_moe", "blk.0.ffn_gate_exps.weight", lambda values: values.flip(0)),
        ("llama3", "output.weight", lambda values: values.roll(1, 0)),
    ],
)
def test_a_planted_fault_is_far_from_the_model(
    name: str, tensor: str, change: Callable[[Any], Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_model_file(folder_of(name), tmp_path / "model.gguf", spoil={tensor: change})
    assert agreement(folder_of(name), file).mean_kl > 1e-3


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "llama.rope.freq_base", 500_000.0),
        ("qwen2", "qwen2.attention.layer_norm_rms_epsilon", 0.1),
        ("gemma2", "gemma2.attention.sliding_window", 4),
        ("granite", "granite.logit_scale", 1.0),
    ],
)
def test_wrong_metadata_are_far_from_the_model(
    name: str, key: str, value: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_model_file(folder_of(name), tmp_path / "model.gguf", keys={key: value})
    assert agreement(folder_of(name), file).mean_kl > 1e-4


def test_rounded_bounds_of_yarn_show_in_the_certificate(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", classes.gpt_oss.GptOssConfig(**COMMON, **GQA, **OSS))  # truncate: false
    assert agreement(folder, write_model_file(folder, tmp_path / "model.gguf")).max_logit_difference > 1e-3


def test_a_missing_key_and_a_missing_scaling_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_model_file(folder_of("llama"), tmp_path / "a.gguf", keys={"llama.rope.freq_base": ""})
    with pytest.raises(QloraError, match=r"llama\.rope\.freq_base is missing"):
        agreement(folder_of("llama"), file)
    spoil = {"rope_freqs.weight": lambda values: values * 2}
    with pytest.raises(QloraError, match=r"rope_freqs\.weight is not this model's scaling"):
        agreement(folder_of("llama3"), write_model_file(folder_of("llama3"), tmp_path / "b.gguf", spoil=spoil))
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    with pytest.raises(QloraError, match="can't be read as GGUF"):
        GgufFile(tmp_path / "c.gguf")


REFUSED = {
    "window": (classes.mistral.MistralConfig(**COMMON, **GQA, sliding_window=32), "no sliding window"),
    "phi window": (classes.phi3.Phi3Config(**COMMON, num_key_value_heads=2, sliding_window=32), "no sliding window"),
    "pattern": (
        classes.gemma3.Gemma3TextConfig(
            **COMMON, **GQA, query_pre_attn_scalar=16, layer_types=["full_attention", "sliding_attention"]
        ),
        "layer_types differ",
    ),
    "scale": (classes.gemma2.Gemma2Config(**COMMON, **GQA, query_pre_attn_scalar=99), "scales attention"),
    "rope": (
        classes.llama.LlamaConfig(**COMMON, **GQA, rope_parameters={**ROPE, "rope_type": "dynamic"}),
        "no rotary embedding of kind dynamic",
    ),
    "activation": (classes.llama.LlamaConfig(**COMMON, **GQA, hidden_act="relu"), "this model relu"),
    "class": (
        classes.opt.OPTConfig(vocab_size=384, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2),
        "OPTForCausalLM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_form_for_is_refused(case: str, tmp_path: Path) -> None:
    config, reason = REFUSED[case]
    config.architectures = [f"{type(config).__name__.removesuffix('Config').removesuffix('Text')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{reason}.*--llama-cpp DIR"):
        write_model_file(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
