"""Roles and turns that a template refuses, in a form that it takes: by a stated rule that is counted, or not at all."""

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
from qlora.data.conversations.roles import DEVELOPER_AS_SYSTEM, SYSTEM_MERGED, USERS_MERGED
from qlora.data.prepare import prepare
from qlora.data.types import IGNORED, Message, Record, RecordError

END = "<end_of_turn>"
KNOWN = (
    "{% for m in messages if m.role != 'developer' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
)
KNOWN += "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture(scope="module")
def strict() -> Encoder:
    return Encoder(make_tokenizer("gemma_like", "gemma"))


def turns_of(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def result_of(encoder: Encoder, fields: dict[str, Any]) -> Encoded | RecordError | None:
    return encode_chunk([Record("x:1", fields)], "auto", encoder)[0]


def texts_of(encoder: Encoder, result: Encoded | RecordError | None) -> tuple[str, str]:
    """The text of all tokens, and of the trained ones."""
    assert isinstance(result, Encoded), result
    labels = result.example.labels
    return encoder.decode(result.example.input_ids), encoder.decode(labels[labels != IGNORED])


RULES = {
    "system": ([("system", "Be brief."), ("user", "One?"), ("assistant", "Two.")], (SYSTEM_MERGED,)),
    "users": ([("user", "Be brief."), ("user", "One?"), ("assistant", "Two.")], (USERS_MERGED,)),
    "both": ([("system", "Be"), ("user", "brief."), ("user", "One?"), ("assistant", "Two.")],
             (SYSTEM_MERGED, USERS_MERGED)),
    "developer": ([("developer", "Be brief."), ("user", "One?"), ("assistant", "Two.")],
                  (DEVELOPER_AS_SYSTEM, SYSTEM_MERGED)),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_strict_template_gets_merged_messages_and_the_rule_is_counted(name: str, strict: Encoder) -> None:
    turns, rules = RULES[name]
    result = result_of(strict, turns_of(*turns))
    text, trained = texts_of(strict, result)
    assert isinstance(result, Encoded) and result.answers.merges == rules and trained == f"Two.{END}"
    assert "Be\n\nbrief.\n\nOne?" in text if name == "both" else "Be brief.\n\nOne?" in text
    prompt = strict.prompt_ids([Message(role, content) for role, content in turns[:-1]])
    assert result.example.input_ids[: len(prompt)].tolist() == prompt  # generate and chat send the same


def test_a_lenient_template_gets_the_messages_as_they_are() -> None:
    encoder = Encoder(make_tokenizer("bytes", "chatml"))
    for turns, _ in RULES.values():
        result = result_of(encoder, turns_of(*turns))
        assert isinstance(result, Encoded) and result.answers.merges == ()


def test_a_role_that_the_template_leaves_out_becomes_the_system_message(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(KNOWN)
    encoder = Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(path))
    result = result_of(encoder, turns_of(*RULES["developer"][0]))
    assert texts_of(encoder, result)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert isinstance(result, Encoded) and result.answers.merges == (DEVELOPER_AS_SYSTEM,)


def test_two_answers_in_a_row_are_refused_with_the_templates_own_words(strict: Encoder) -> None:
    turns = turns_of(("user", "One?"), ("assistant", "Two."), ("assistant", "Three."))
    assert "turns must alternate" in str(result_of(strict, turns))


def test_a_first_answer_is_context_and_a_last_question_bears_no_loss() -> None:
    encoder = Encoder(make_tokenizer("bytes", "chatml"))
    result = result_of(
        encoder, turns_of(("assistant", "Hello."), ("user", "One?"), ("assistant", "Two."), ("user", "And?"))
    )
    text, trained = texts_of(encoder, result)
    assert trained == "Two.<|im_end|>" and "Hello." in text and "And?" in text
    assert isinstance(result, Encoded) and (result.answers.total, result.answers.trained) == (2, 1)


def test_calls_and_results_in_parallel_are_one_answer_and_its_context(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATES["object"])
    encoder = Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(path))
    calls = [{"id": f"call{i}", "type": "function", "function": {"name": "look", "arguments": json.dumps({"at": i})}}
             for i in range(2)]  # fmt: skip
    results = [{"role": "tool", "content": f"result {i}", "tool_call_id": f"call{i}"} for i in range(2)]
    turns = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": None, "tool_calls": calls}, *results,
             {"role": "assistant", "content": "Done."}]  # fmt: skip
    result = result_of(encoder, {"messages": turns, "tools": [{"type": "function", "function": {"name": "look"}}]})
    text, trained = texts_of(encoder, result)
    assert trained.count("<tool_call>") == 2 and trained.endswith("<|im_end|>Done.<|im_end|>")
    assert "result" not in trained and text.count("result ") == 2


def test_merges_are_a_warning_that_counts_records(tmp_path: Path, strict: Encoder) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(turns_of(*RULES["system"][0])) for _ in range(3)))
    report = prepare(Data.model_validate({"train": str(path), "eval_fraction": 0}), strict, 0).report
    messages = [finding.message for finding in report.warnings if finding.where == "data.train"]
    assert any(
        text.startswith(f"3 records trained with {SYSTEM_MERGED}: the chat template refuses") for text in messages
    )
    assert report.summary()[1] == "answers trained: 3 of 3"
