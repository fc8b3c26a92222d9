"""An exported chat template renders as training did, without arguments; what a server passes still counts."""

from typing import Any

import pytest
from data.test_real_templates import FOLDER
from support.tokenizers import make_tokenizer

from qlora.data.conversations.chat_template import Template
from qlora.exporters.served_template import with_default_arguments

TURNS = [
    {"role": "user", "content": "How many moons?"}, {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And here?"},
]  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"enable_thinking": False}),
    ("qwen3_8", {"enable_thinking": False}),
    ("gptoss", {"reasoning_effort": "high"}),
    ("glm4moe", {"enable_thinking": False}),
]


@pytest.mark.parametrize(("name", "args"), CASES)
def test_the_exported_template_renders_as_training_did(name: str, args: dict[str, Any]) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    plain, trained = Template(tokenizer, "auto"), Template(tokenizer, "auto", args=args)
    tokenizer.chat_template = with_default_arguments(tokenizer.chat_template, args)
    exported = Template(tokenizer, "auto")
    assert exported.render(TURNS, prompt=True) == trained.render(TURNS, prompt=True) != plain.render(TURNS, prompt=True)
    other = {key: value[::-1] if isinstance(value, str) else not value for key, value in args.items()}
    passed = Template(tokenizer, "auto", args=other)
    tokenizer.chat_template = plain.text
    assert passed.render(TURNS, prompt=True) == Template(tokenizer, "auto", args=other).render(TURNS, prompt=True)


def test_a_line_end_at_the_beginning_is_kept() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = with_default_arguments("\n{{ messages[0].content }} {{ word }}", {"word": 'it\'s "so"'})
    assert Template(tokenizer, "auto").render(TURNS) == '\nHow many moons? it\'s "so"'
