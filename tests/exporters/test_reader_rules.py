"""The lint of an exported folder: each rule can apply, none applies where it need not, and sources are named."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from qlora.exporters.reader_rules import RULES, ReaderFinding, findings

SOUND: dict[str, Any] = {
    "model_type": "llama", "rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e4, "rope_scaling": None,
    "dtype": "bfloat16", "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
}  # fmt: skip
TOKENIZER: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
VOCABULARY = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<new>"}]}


def folder_of(folder: Path, config: Mapping[str, Any] = SOUND, tokenizer: Mapping[str, Any] = TOKENIZER) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    return folder


def readers(results: list[ReaderFinding]) -> set[str]:
    return {result.reader for result in results}


def test_a_sound_folder_has_no_findings(tmp_path: Path) -> None:
    assert findings(folder_of(tmp_path)) == []


def without(config: Mapping[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names} | changes


SIXTH = ["sliding_attention"] * 5 + ["full_attention"]
MISTRAL = {"model_type": "mistral", "sliding_window": 512}
CASES: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    (without(SOUND, "rope_theta"), TOKENIZER, {"transformers", "Ollama", "mlx-lm"}),
    (without(SOUND, model_type="gpt_neox"), TOKENIZER, {"llama.cpp", "mlx-lm"}),
    (without(SOUND, "torch_dtype"), TOKENIZER, {"transformers"}),
    (SOUND, without(TOKENIZER, tokenizer_class="TokenizersBackend"), {"transformers"}),
    (SOUND, without(TOKENIZER, "chat_template"), {"vLLM", "SGLang", "Ollama"}),
    (without(SOUND, **MISTRAL), TOKENIZER, {"llama.cpp", "mlx-lm"}),
    (without(SOUND, **MISTRAL, max_position_embeddings=512), TOKENIZER, set()),
    (without(SOUND, **MISTRAL, use_sliding_window=False), TOKENIZER, set()),
    (without(SOUND, model_type="gemma3_text", layer_types=SIXTH[::-1]), TOKENIZER, {"llama.cpp"}),
    (without(SOUND, model_type="gemma3_text", layer_types=SIXTH * 2), TOKENIZER, set()),
    (without(SOUND, model_type="gemma3_text", layer_types=SIXTH[:4]), TOKENIZER, set()),
    ({"model_type": "wrapper", "torch_dtype": "x", "text_config": without(SOUND, "rope_theta")}, TOKENIZER,
     {"transformers", "Ollama", "mlx-lm"}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_rule_names_the_readers_that_compute_otherwise(number: int, tmp_path: Path) -> None:
    config, tokenizer, expected = CASES[number]
    assert readers(findings(folder_of(tmp_path, config, tokenizer))) == expected


def test_added_tokens_beside_a_sentencepiece_model_must_be_listed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    assert readers(findings(folder)) == {"llama.cpp"}
    (folder / "added_tokens.json").write_text('{"<new>": 1}')
    assert findings(folder) == []


def test_every_rule_names_version_and_source_and_is_documented() -> None:
    page = (ROOT / "docs" / "served.md").read_text()
    for rule in RULES:
        assert rule.version and rule.source and f"{rule.reader} {rule.version}" in page, rule
