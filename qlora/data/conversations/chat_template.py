"""The chat template: which one is used, conversations rendered through it, and ceilings on what it may cost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.data.types import RecordError
from qlora.errors import DataError

Turn = Mapping[str, Any]

# For tokenizers without a template. The end token closes an answer, so the model learns to stop.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)

_SLACK_CHARS = 2**20  # headers, tool schemas and system prompts that a template adds to a conversation
_GROWTH = 64  # characters rendered per character given, at most
_DATE = "26 Jul 2024"  # Llama-3's own default: with today's date, tomorrow's resume would see other tokens


class Template:
    """A chat template of `tokenizer`. `name` says where it comes from; `text` is its Jinja source."""

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        self._tokenizer = tokenizer
        self.name, self.text = _choose(tokenizer, chat_template)
        self._variables = {"date_string": _DATE} if "strftime_now" in self.text else {}

    @property
    def bos(self) -> str:
        """The beginning-of-text token as text; empty if the tokenizer has none."""
        return str(self._tokenizer.bos_token or "")

    def render(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the assistant begins to speak. RowError if refused."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._variables,
            )
        except Exception as error:  # a template is a program of its own: it may fail in any way
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise RecordError("refused by the chat template", line) from None
        return _within(text, turns, tools)


def _choose(tokenizer: Any, chat_template: str) -> tuple[str, str]:
    if chat_template != "auto":
        path = Path(chat_template)
        if not path.is_file():
            raise DataError(f"model.chat_template: no file {chat_template}. Allowed: auto, or a Jinja file's path.")
        return f"chat template {chat_template}", _read(path)
    if tokenizer.chat_template:
        return "the model's own chat template", tokenizer.get_chat_template()
    if tokenizer.eos_token is None:
        raise DataError(
            "tokenizer: neither a chat template nor an end token, so a model could not learn to stop. "
            "Name the token in eos_token of tokenizer_config.json, or give model.chat_template=FILE.jinja."
        )
    return "qlora's plain template (the model has none)", PLAIN


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {path} can't be read as text: {error}") from None


def _within(text: str, turns: Sequence[Turn], tools: Sequence[Any] | None) -> str:
    if len(text) > _SLACK_CHARS:
        given = len(json.dumps([list(turns), tools], default=str))
        if len(text) > _SLACK_CHARS + _GROWTH * given:
            raise RecordError("refused by the chat template", f"it made {len(text)} characters out of {given}")
    return text
