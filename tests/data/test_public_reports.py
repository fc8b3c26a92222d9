"""Further public reports about training data, tried as they were written: what is trained, or the reason why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers import make_tokenizer
from support.tool_templates import TEMPLATES

from qlora.data import Data
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.types import IGNORED, Record, RecordError


@pytest.fixture(scope="module")
def chatml() -> Encoder:
    return Encoder(make_tokenizer("bytes", "chatml"))


def turns_of(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def result_of(encoder: Encoder, fields: dict[str, Any]) -> Encoded | RecordError:
    result = encode_chunk([Record("x:1", fields)], "auto", encoder)[0]
    assert result is not None
    return result


def trained_text(encoder: Encoder, fields: dict[str, Any]) -> str:
    result = result_of(encoder, fields)
    assert isinstance(result, Encoded), result
    return encoder.decode(result.example.labels[result.example.labels != IGNORED])


def test_turns_in_a_row_and_a_last_question_are_kept_untrained(chatml: Encoder) -> None:
    """smol-course#260."""
    twice = turns_of(("user", "One?"), ("user", "Two?"), ("assistant", "Three."))
    assert trained_text(chatml, twice) == "Three.<|im_end|>"
    last = turns_of(("user", "One?"), ("assistant", "Two."), ("user", "Three?"))
    assert trained_text(chatml, last) == "Two.<|im_end|>"
    answers = turns_of(("user", "One?"), ("assistant", "Two."), ("assistant", "Three."))
    assert trained_text(chatml, answers) == "Two.<|im_end|>Three.<|im_end|>"
    strict = Encoder(make_tokenizer("gemma_like", "gemma"))
    assert "turns must alternate" in str(result_of(strict, answers))
    assert trained_text(strict, twice) == "Three.<end_of_turn>"  # the questions as one
    assert trained_text(strict, last) == "Two.<end_of_turn>"


def test_a_closing_tag_alone_is_part_of_the_answer() -> None:
    """ms-swift#4939, trl#6361."""
    encoder = Encoder(make_tokenizer("bytes", "qwen3"))
    fields = turns_of(("user", "Sum?"), ("assistant", "I add.\n</think>\n\nFour."))
    assert "I add." in trained_text(encoder, fields) and "Four.<|im_end|>" in trained_text(encoder, fields)


def test_side_columns_may_change_their_type(tmp_path: Path, chatml: Encoder) -> None:
    """FlashRAG#132, datasets#7496: the one bad record is named."""
    path = tmp_path / "records.jsonl"
    records = [{"prompt": f"Q{i}", "completion": "A", "meta": meta} for i, meta in enumerate([1, "x", {"a": 1}, [2]])]
    path.write_text("\n".join(map(json.dumps, [*records, {"prompt": "Q", "completion": 7}])))
    report = prepare(Data.model_validate({"train": str(path), "eval_fraction": 0}), chatml, 0).report
    assert report.kept == 4 and report.dropped == {"wrong type": 1}
    message = next(finding.message for finding in report.warnings if finding.where.endswith(":5"))
    assert "completion is int, a string is expected" in message


def test_answers_behind_the_limit_leave_no_evaluation_data(tmp_path: Path, chatml: Encoder) -> None:
    """Chinese-LLaMA-Alpaca-2#424, llama-cookbook#133: never a loss that is not a number."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text(json.dumps({"prompt": "Q", "completion": "A"}))
    long = {"prompt": "word " * 100, "completion": "A"}
    section = {"train": str(train), "eval": str(held_out), "max_length": 64, "overlong": "truncate"}
    held_out.write_text("\n".join([json.dumps(long)] * 3))
    problems = prepare(Data.model_validate(section), chatml, 0).report.problems
    assert "no records left of 3: nothing left to train 3" in problems[-1].message
    held_out.write_text("\n".join(map(json.dumps, [long, {"prompt": "Q2", "completion": "A"}])))
    prepared = prepare(Data.model_validate(section), chatml, 0)
    assert not prepared.report.problems and len(prepared.eval) == 1 and prepared.eval[0].trained_tokens()


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": ""}], ids=["null", "no key", "empty"])
def test_a_call_without_content_never_writes_none(message: dict, tmp_path: Path) -> None:
    """PrimeIntellect renderers#131, transformers#45348, mlx-vlm#1864."""
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATES["object"].replace("(m.content or '')", "m.content"))
    encoder = Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(path))
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    fields = {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", **message, "tool_calls": [call]}]}
    assert trained_text(encoder, fields) == '<tool_call>{"name": "look", "arguments": {}}</tool_call><|im_end|>'


@pytest.mark.parametrize("key", ["text", "value"])
def test_content_in_parts_is_text(key: str, chatml: Encoder) -> None:
    """LLaMA-Factory's newer sets, with a loss weight a message."""
    parts = [{"type": "text", key: "Two"}, {"type": "text", key: "."}]
    turns = [{"role": "user", "content": parts[:1]}, {"role": "assistant", "content": parts, "loss_weight": 1.0}]
    assert trained_text(chatml, {"messages": turns}) == "Two.<|im_end|>"
    shares = [{"from": "human", "value": parts}, {"from": "gpt", "value": parts}]
    assert trained_text(chatml, {"conversations": shares}) == "Two.<|im_end|>"


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "message 1: a content part is 'image_url'; only text"),
        ({"type": "reasoning", "value": "hm"}, "message 1: a content part is 'reasoning'; only text"),
        ({"type": "tool_call", "value": "{}"}, "message 1: a content part is 'tool_call'; only text"),
        ({"type": "text"}, "message 1: a text part has the keys type; one text under `text` is expected"),
        ({"type": "text", "text": "a", "value": "b"}, "a text part has the keys type, text, value"),
        ({"type": "text", "text": 7}, "a text part has the keys type, text"),
        (7, "a content part is 'int'"),
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(part: object, reason: str, chatml: Encoder) -> None:
    assert reason in str(result_of(chatml, turns_of(("user", [part]), ("assistant", "Two."))))


def test_an_answer_without_a_question_names_the_format_of_plain_text(chatml: Encoder) -> None:
    """ms-swift#2750: pre-training data as messages."""
    assert "As plain text it is" in str(result_of(chatml, turns_of(("assistant", "I love music"))))
