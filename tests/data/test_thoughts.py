"""Thoughts of a record in any form are one thing: handed to the template once in the form that it reads, or counted."""

from typing import Any

import pytest
from support.tokenizers import make_tokenizer

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.chat_template import TemplateOptions
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Record, RecordError

THOUGHT = "Mars: Phobos, Deimos."
QUESTION = {"role": "user", "content": "How many moons has Mars?"}
FORMS: dict[str, dict[str, Any]] = {
    "reasoning_content": {"content": "Two.", "reasoning_content": THOUGHT},
    "reasoning": {"content": "Two.", "reasoning": f"{THOUGHT}\n"},
    "thinking": {"content": "Two.", "thinking": THOUGHT},
    "two keys": {"content": "Two.", "thinking": THOUGHT, "reasoning_content": THOUGHT},
    "key and content": {"content": f"<think>{THOUGHT}</think>Two.", "thinking": THOUGHT},
    "key and empty block": {"content": "<think>\n\n</think>\n\nTwo.", "thinking": THOUGHT},
    "think": {"content": f"<think>\n{THOUGHT}\n</think>\n\nTwo."},
    "thinking tag": {"content": f"<thinking>{THOUGHT}</thinking>\nTwo."},
    "thought tag": {"content": f"\n<thought>{THOUGHT}</thought>Two."},
    "closing tag": {"content": f"{THOUGHT}\n</think>\n\nTwo."},
}
END = "<|im_end|>"
BLOCK = f"<think>\n{THOUGHT}\n</think>\n\nTwo.{END}"


def encoder_of(template: str, thinking: str = "as_template") -> Encoder:
    return Encoder(make_tokenizer("bytes", template), options=TemplateOptions(thinking=thinking))


@pytest.fixture(scope="module")
def qwen3() -> Encoder:
    return encoder_of("qwen3")


@pytest.fixture(scope="module")
def chatml() -> Encoder:
    return encoder_of("chatml")


def result_of(encoder: Encoder, **answer: Any) -> Encoded | RecordError | None:
    return encode_chunk([Record("x:1", {"messages": [QUESTION, {"role": "assistant", **answer}]})], "auto", encoder)[0]


def trained(encoder: Encoder, **answer: Any) -> str:
    result = result_of(encoder, **answer)
    assert isinstance(result, Encoded), result
    return encoder.decode(result.example.labels[result.example.labels != IGNORED])


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_trained_once_under_the_key_of_the_template(form: str, qwen3: Encoder) -> None:
    assert trained(qwen3, **FORMS[form]) == BLOCK


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_left_out_by_drop(form: str) -> None:
    for template in ("qwen3", "chatml"):
        encoder = encoder_of(template, "drop")
        result = result_of(encoder, **FORMS[form])
        assert trained(encoder, **FORMS[form]) == f"Two.{END}"
        assert isinstance(result, Encoded) and not result.unused.thoughts and result.answers.thoughts == 1


@pytest.mark.parametrize("form", list(FORMS)[:4])
def test_a_template_without_a_place_counts_them_or_gets_a_block(form: str, chatml: Encoder) -> None:
    assert trained(chatml, **FORMS[form]) == f"Two.{END}"
    result = result_of(chatml, **FORMS[form])
    assert isinstance(result, Encoded) and (result.answers.thoughts, result.answers.trained_thoughts) == (1, 0)
    assert result.unused.thoughts
    assert trained(encoder_of("chatml", "in_content"), **FORMS[form]) == BLOCK


def test_a_thought_in_the_content_stays_there_by_default(chatml: Encoder) -> None:
    for form in ("think", "closing tag"):
        assert trained(chatml, **FORMS[form]) == f"{FORMS[form]['content']}{END}"
        result = result_of(chatml, **FORMS[form])
        assert isinstance(result, Encoded) and (result.answers.thoughts, result.answers.trained_thoughts) == (1, 1)


REFUSED = {
    "two thoughts": {"content": "Two.", "thinking": THOUGHT, "reasoning": "Another one."},
    "two thoughts: message 2: thinking and <think> in content": {
        "content": "<think>Else.</think>Two.",
        "thinking": "I",
    },
    "unclosed thought: message 2: <think> without </think>": {"content": "<think>\nMars: Phobos"},
    "wrong type: message 2: reasoning_content is list": {"content": "Two.", "reasoning_content": [THOUGHT]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_thoughts_that_are_not_clear_are_refused(message: str, qwen3: Encoder) -> None:
    assert message in str(result_of(qwen3, **REFUSED[message]))


def test_an_unclosed_thought_in_a_masked_answer_is_context(qwen3: Encoder) -> None:
    turns = [QUESTION, {"role": "assistant", "content": "<think>\nMars", "train": False}, QUESTION,
             {"role": "assistant", "content": "Two."}]  # fmt: skip
    result = encode_chunk([Record("x:1", {"messages": turns})], "auto", qwen3)[0]
    assert isinstance(result, Encoded) and result.answers.total == result.answers.trained == 1


def test_a_tag_inside_code_does_not_end_a_thought(qwen3: Encoder, chatml: Encoder) -> None:
    text = trained(qwen3, content="<think>It ends with `</think>`, mind.</think>Two.")
    assert text == f"<think>\nIt ends with `</think>`, mind.\n</think>\n\nTwo.{END}"
    quoted = "Write `</think>` at its end."
    assert trained(chatml, content=quoted) == f"{quoted}{END}"
    result = result_of(chatml, content=quoted)
    assert isinstance(result, Encoded) and result.answers.thoughts == 0
