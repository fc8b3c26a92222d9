"""Redaction: secrets are removed from text in every position; ordinary text is unchanged."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.faults.planted_secrets import plant

from qlora.utils.redact import MARK, RedactedStream, redacted, redacted_values

ORDINARY = (
    "dropped 12 rows: no target (first: rows.jsonl:7; `qlora check` names each)",
    "step 10/60  loss 1.2345  rate 2.00e-04  1,234 tokens/s  0:12 left",
    "eos_token: <|end_of_text|>, pad_token: <pad>, trained_tokens: 123456",
    "the end token <|im_end|> closes an answer; its key: self_attn.q_proj",
    "sha256 3b5d5c3712955042212316173ccf37be8005b25a2b9ef9d8a4c5d3f2f6d8b0a1",
    "model.layers.0.self_attn.q_proj.weight [64, 64] at https://huggingface.co/meta-llama/Llama-3.1-8B",
    "write to me@example.org, or see http://localhost:6006/#scalars",
    "adapter.rank=32 optim.learning_rate=2e-4 train.output=runs/risk-assessment-of-sk-learn",
    "C:\\Users\\me\\model, ~/models/base, /home/me/hf_models/llama",
)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert redacted(text) == text


@given(st.integers(0, 10**6), st.text(max_size=20), st.text(max_size=20))
def test_a_secret_is_redacted_in_every_position(seed: int, before: str, after: str) -> None:
    _, shapes = plant(seed)
    for name, secret in shapes.items():
        for slashes in ("//", "/"):
            url = f"{before} https:{slashes}u:{secret}@h/ {after}"
            text = url if name == "url password" else f"{before} {secret} {after}"
            assert secret not in redacted(text) and MARK in redacted(text), name


@given(st.integers(0, 10**6))
def test_values_of_secret_variables_are_redacted_in_every_escaping(seed: int) -> None:
    import json
    from urllib.parse import quote

    variables, _ = plant(seed)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for value in variables.values():
            for form in (value, repr(value), json.dumps({"a": value}), quote(value)):
                assert value not in redacted(form) and MARK in redacted(form)


def test_paths_and_short_words_in_secret_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("HF_TOKEN_PATH", "/home/me/token"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("SSH_KEY", "~/key/x"),
    ):
        monkeypatch.setenv(name, value)
        assert redacted(f"see {value}") == f"see {value}"


def test_redacted_values_keep_their_structure() -> None:
    secret = "hf_" + "a1B2" * 8
    value = {"a": [1, None, secret, {"b": (secret, 2.5, True)}]}
    assert redacted_values(value) == {"a": [1, None, MARK, {"b": (MARK, 2.5, True)}]}


def test_a_redacted_stream_is_a_stream() -> None:
    target = io.StringIO()
    stream = RedactedStream(target)
    secret = "ghp_" + "a1B2" * 9
    assert stream.write(f"x {secret}\n") == len(secret) + 3
    stream.writelines([secret, "y"])
    assert target.getvalue() == f"x {MARK}\n{MARK}y" and stream.isatty() is False
