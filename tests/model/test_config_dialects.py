"""config.json in two dialects: transformers reads the same model from both, and from the older one alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.architecture_table import PACKED, UNPACKED, WITH_EXPERTS
from support.architectures import tiny_config
from support.tiny_models import COMMON, GQA
from transformers import AutoConfig
from transformers import models as zoo

from qlora.model.config_dialects import NESTED, ROPE, TEXT, in_both_dialects, window_pattern, with_dtype, with_rope

SCALED = {
    "llama3": zoo.llama.LlamaConfig(**COMMON, **GQA, rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }),
    "longrope": zoo.phi3.Phi3Config(**COMMON, original_max_position_embeddings=64, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    }),
    "yarn": zoo.qwen2.Qwen2Config(**COMMON, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64,
    }),
    "gemma3": zoo.gemma3.Gemma3TextConfig(**(COMMON | {"num_hidden_layers": 6}), **GQA, rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }),
    "neox": zoo.gpt_neox.GPTNeoXConfig(**COMMON, rope_parameters={
        "rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5,
    }),
}  # fmt: skip


def differences(first: Any, second: Any) -> list[str]:
    """Keys of the first configuration that the second has otherwise."""
    own = {key: value for key, value in first.items() if key not in ("_name_or_path", "transformers_version")}
    nested = [f"{k}.{d}" for k, v in own.items() if isinstance(v, dict) and isinstance(second.get(k), dict)
              for d in differences(v, second[k])]  # fmt: skip
    return nested + [key for key, value in own.items() if not isinstance(value, dict) and value != second.get(key)]


def read(folder: Path, config: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def check(config: Any, folder: Path) -> dict[str, Any]:
    """Both dialects read as the base, and the older one alone where there is one; returns the written config."""
    config.save_pretrained(folder)
    base = AutoConfig.from_pretrained(folder)
    original = json.loads((folder / "config.json").read_text())
    both = in_both_dialects(original, base.get_text_config())
    assert differences(base.to_dict(), read(folder / "both", both).to_dict()) == []
    part = both.get(TEXT, both)
    if "rope_theta" in part and "rope_theta" not in original.get(TEXT, original):
        old = {key: value for key, value in part.items() if key != ROPE}
        alone = read(folder / "old", {**both, TEXT: old} if TEXT in both else old)
        assert differences(base.to_dict(), alone.to_dict()) == []
    return both


@pytest.mark.sample(of=12)
@pytest.mark.parametrize("kind", [*PACKED, *UNPACKED, *WITH_EXPERTS])
def test_transformers_reads_every_class_from_both(kind: str, tmp_path: Path) -> None:
    check(tiny_config(kind), tmp_path)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_are_in_both(name: str, tmp_path: Path) -> None:
    both = check(SCALED[name], tmp_path)
    rope = both[ROPE].get("full_attention", both[ROPE])
    assert both["rope_theta"] == rope["rope_theta"]
    scaling = both["rope_scaling"] or {"rope_type": "default"}
    assert scaling.get("rope_type", scaling.get("type")) == rope["rope_type"]
    assert {key: value for key, value in scaling.items() if key != "type"}.items() <= rope.items()
    if name == "gemma3":
        assert both["rope_local_base_freq"] == 2e4 and both["sliding_window_pattern"] == 6
    if name == "neox":
        assert (both["rotary_pct"], both["rotary_emb_base"]) == (0.5, 3e4)


def test_what_a_config_has_is_kept() -> None:
    config = {"model_type": "llama", "rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    text = zoo.llama.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 9.0})
    assert in_both_dialects(config, text).items() >= config.items()
    assert all(name not in NESTED for name in ("gemma4", "lfm3"))


def test_patterns_of_windows() -> None:
    s, f = "sliding_attention", "full_attention"
    assert [window_pattern(p) for p in ([s, s, f, s, s, f], [s, f], [f, s], [s, s], [])] == [3, 2, None, None, None]


def test_both_dtype_keys_are_written() -> None:
    both = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert with_dtype({"torch_dtype": "float32"}, "bfloat16") == both
    assert with_dtype({TEXT: {"dtype": "float32"}}, "bfloat16") == both | {TEXT: both}
    assert with_dtype({TEXT: {"a": 1}}, "bfloat16") == both | {TEXT: {"a": 1}}


def test_a_rotated_part_of_a_head_is_a_top_level_key_too() -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    written = with_rope({"model_type": "phi3"}, SimpleNamespace(rope_parameters=rope))
    assert written["partial_rotary_factor"] == 0.5 and written["rope_theta"] == 10_000.0
    assert "partial_rotary_factor" not in with_rope({}, SimpleNamespace(rope_parameters={"rope_theta": 1.0}))
