"""Plain messages rendered by the compiled template: what apply_chat_template writes; others are left to it."""

import random
from typing import Any

import pytest
from data.test_real_templates import FILES, FOLDER
from support.tokenizers import FAMILIES, make_tokenizer, tokenizer_for
from transformers import PreTrainedTokenizerFast

from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.conversations.compiled_template import compile_template
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import Record, RecordError

TEXTS = ("Hello there?", "", " lead", "trail \n", "<think>\nhm\n</think>\n\nYes.", "a</think>\nb", "<tool_response>1",
         "<|im_end|>", "{{ 7 }}", "é😀漢", "None", "one\n\ntwo")  # fmt: skip
QUESTION, ANSWER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}


def random_turns(draw: random.Random) -> list[Turn]:
    roles = [*(["system"] if draw.random() < 0.3 else []), *["user", "assistant"] * draw.randrange(1, 4)]
    roles = [draw.choice(["user", "assistant", "tool", "wizard"]) if draw.random() < 0.1 else role for role in roles]
    return [{"role": role, "content": draw.choice(TEXTS)} for role in roles[: draw.randrange(1, len(roles) + 1)]]


def by_transformers(tokenizer: Any, template: Template, turns: list[Turn], prompt: bool) -> str | None:
    try:
        options = {"chat_template": template.pinned_text, "add_generation_prompt": prompt, "tokenize": False}
        return str(tokenizer.apply_chat_template(turns, **options, **template.variables))
    except Exception:
        return None


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("name", FILES)
def test_real_templates_write_the_same(name: str, seed: int) -> None:
    tokenizer = tokenizer_for((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
    template, draw = Template(tokenizer, "auto"), random.Random(seed)
    compiled = compile_template(tokenizer, template.pinned_text, template.variables)
    assert compiled is not None
    pairs = [(random_turns(draw), draw.random() < 0.5) for _ in range(30)]
    expected = [by_transformers(tokenizer, template, *pair) for pair in pairs]
    assert [compiled.render(*pair) for pair in pairs] == expected
    for (turns, prompt), text in zip(pairs, expected, strict=True):
        if text is None:
            with pytest.raises(RecordError, match="refused by the chat template"):
                template.render(turns, prompt=prompt)
        else:
            assert template.render(turns, prompt=prompt) == text


def test_other_messages_are_left_to_transformers() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    compiled = compile_template(tokenizer, tokenizer.chat_template, {})
    assert compiled is not None and compiled.render([QUESTION, ANSWER], prompt=False)
    changes: list[dict[str, Any]] = [{"name": None}, {"content": 3}, {"content": ["a"]}, {"tool_calls": []}]
    others: list[Any] = [[], (QUESTION,), [{"role": "user"}], ["Hello?"], *([{**QUESTION, **more}] for more in changes)]
    assert [compiled.render(turns, prompt=True) for turns in others] == [None] * len(others)


def test_a_tokenizer_that_renders_in_another_way_is_asked_itself() -> None:
    class Polite(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
            return f"Please. {super().apply_chat_template(conversation, *args, **options)}"

    plain = make_tokenizer("bytes", "chatml")
    tokenizer = Polite(tokenizer_object=plain.backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = plain.chat_template
    assert compile_template(tokenizer, tokenizer.chat_template, {}) is None
    assert Template(tokenizer, "auto").render([QUESTION]).startswith("Please. <|im_start|>user")
    assert compile_template(plain, "{% for %}", {}) is None  # not a template


@pytest.mark.parametrize(("template", "kind"), FAMILIES, ids=lambda value: value)
def test_a_chunk_has_the_encodings_of_its_records_one_by_one(template: str, kind: str, seed: int) -> None:
    draw, encoder = random.Random(seed), Encoder(make_tokenizer(kind, template))
    records = [Record(f"x:{number}", {"messages": random_turns(draw)}) for number in range(25)]
    together = [described(result) for result in encode_chunk(records, "auto", encoder)]
    assert together == [described(encode_chunk([record], "auto", encoder)[0]) for record in records]


def described(result: Any) -> Any:
    if isinstance(result, RecordError):
        return str(result)
    example = result.example
    arrays = (example.input_ids.tolist(), example.labels.tolist(), example.branches, example.where)
    return arrays, result.control_strings, result.end_trained, result.unknown_tokens, result.unused, result.answers
